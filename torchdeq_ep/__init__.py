"""Equilibrium propagation as a backward pass for torchdeq's deep-equilibrium models."""

from importlib.metadata import version as _version

from torchdeq_ep import _program as _program
from torchdeq_ep import errors as errors
from torchdeq_ep import holomorphic as holomorphic
from torchdeq_ep import nn as nn
from torchdeq_ep.black_box import EquilibriumReport as EquilibriumReport
from torchdeq_ep.black_box import Sensitivities as Sensitivities
from torchdeq_ep.black_box import attach_equilibrium as attach_equilibrium
from torchdeq_ep.black_box import sensitivities as sensitivities
from torchdeq_ep.host import add_ep_args as add_ep_args
from torchdeq_ep.host import nudge_loss as nudge_loss
from torchdeq_ep.host import register_fixed_point_hook as register_fixed_point_hook
from torchdeq_ep.host import register_homeostasis as register_homeostasis
from torchdeq_ep.host import use_backward as use_backward
from torchdeq_ep.jacobian import ActivityMetric as ActivityMetric
from torchdeq_ep.jacobian import symmetry_penalty as symmetry_penalty
from torchdeq_ep.loops import LoopReport as LoopReport
from torchdeq_ep.loops import loop as loop
from torchdeq_ep.measuring import compare as compare
from torchdeq_ep.measuring import diagnose as diagnose
from torchdeq_ep.modes import EquilibriumPropagation as EquilibriumPropagation
from torchdeq_ep.modes import ImplicitDifferentiation as ImplicitDifferentiation
from torchdeq_ep.modes import InfinitesimalEP as InfinitesimalEP
from torchdeq_ep.modes import NudgeReport as NudgeReport
from torchdeq_ep.modes import Online as Online
from torchdeq_ep.modes import Stencil as Stencil
from torchdeq_ep.modes import available_backwards as available_backwards
from torchdeq_ep.modes import get_backward as get_backward
from torchdeq_ep.modes import register_backward as register_backward
from torchdeq_ep.node import attach as attach
from torchdeq_ep.state import Memory as Memory

__version__ = _version("torchdeq-ep")
