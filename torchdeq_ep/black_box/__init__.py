"""Gradients of systems whose solver is a black box, from its free and nudged equilibria."""

from torchdeq_ep.black_box.attach import attach_equilibrium as attach_equilibrium
from torchdeq_ep.black_box.report import EquilibriumReport as EquilibriumReport
from torchdeq_ep.black_box.sensitivity import Sensitivities as Sensitivities
from torchdeq_ep.black_box.sensitivity import sensitivities as sensitivities
