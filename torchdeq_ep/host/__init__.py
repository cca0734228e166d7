"""Everything that touches torchdeq: switching the backward of its DEQs, cores, a solver, hooks, homeostasis."""

from torchdeq_ep.host.along import AUTO as AUTO
from torchdeq_ep.host.along import TARGET as TARGET
from torchdeq_ep.host.broyden import broyden_inverse_solver as broyden_inverse_solver
from torchdeq_ep.host.cores import EPIndexing as EPIndexing
from torchdeq_ep.host.cores import EPSliced as EPSliced
from torchdeq_ep.host.cores import add_ep_args as add_ep_args
from torchdeq_ep.host.deqs import deqs_of as deqs_of
from torchdeq_ep.host.deqs import fixed_point as fixed_point
from torchdeq_ep.host.homeostasis import Direction as Direction
from torchdeq_ep.host.homeostasis import HomeostasisHandle as HomeostasisHandle
from torchdeq_ep.host.homeostasis import HomeostasisReport as HomeostasisReport
from torchdeq_ep.host.homeostasis import register_homeostasis as register_homeostasis
from torchdeq_ep.host.hooks import FixedPointHandle as FixedPointHandle
from torchdeq_ep.host.hooks import register_fixed_point_hook as register_fixed_point_hook
from torchdeq_ep.host.injection import without_homeostasis as without_homeostasis
from torchdeq_ep.host.reversible import reversible_solver as reversible_solver
from torchdeq_ep.host.rules import EquilibriumRule as EquilibriumRule
from torchdeq_ep.host.solver import relaxation_solver as relaxation_solver
from torchdeq_ep.host.switching import BackwardHandle as BackwardHandle
from torchdeq_ep.host.switching import nudge_loss as nudge_loss
from torchdeq_ep.host.switching import use_backward as use_backward
