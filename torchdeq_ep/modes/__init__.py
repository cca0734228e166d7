"""Backward modes: from a free equilibrium and a cotangent to an error vector, `(f, z*, g) -> v`."""

from torchdeq_ep.modes.amplitude import ForceScale as ForceScale
from torchdeq_ep.modes.base import Derivative as Derivative
from torchdeq_ep.modes.base import Mode as Mode
from torchdeq_ep.modes.base import RelaxedMode as RelaxedMode
from torchdeq_ep.modes.linear import ImplicitDifferentiation as ImplicitDifferentiation
from torchdeq_ep.modes.linear import InfinitesimalEP as InfinitesimalEP
from torchdeq_ep.modes.nudged_map import NudgedMap as NudgedMap
from torchdeq_ep.modes.propagation import EquilibriumPropagation as EquilibriumPropagation
from torchdeq_ep.modes.registry import ModeLike as ModeLike
from torchdeq_ep.modes.registry import available_backwards as available_backwards
from torchdeq_ep.modes.registry import describe_backward as describe_backward
from torchdeq_ep.modes.registry import get_backward as get_backward
from torchdeq_ep.modes.registry import register_backward as register_backward
from torchdeq_ep.modes.report import NudgeReport as NudgeReport
from torchdeq_ep.modes.reversible import Reversible as Reversible
from torchdeq_ep.modes.schedules import Online as Online
from torchdeq_ep.modes.series import Neumann as Neumann
from torchdeq_ep.modes.series import OneStep as OneStep
from torchdeq_ep.modes.shine import Shine as Shine
from torchdeq_ep.modes.stencils import Stencil as Stencil
from torchdeq_ep.modes.steps import Path as Path
from torchdeq_ep.modes.steps import Phantom as Phantom
from torchdeq_ep.modes.steps import StepwiseMode as StepwiseMode
from torchdeq_ep.modes.steps import Trajectory as Trajectory
from torchdeq_ep.modes.steps import Unrolled as Unrolled
from torchdeq_ep.relaxation.kept import Need as Need
