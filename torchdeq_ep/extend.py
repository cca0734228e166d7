"""What distributions that extend this package may rely on, beside the names of `torchdeq_ep` itself.

Everything else inside may change between minor versions. [Extend it](extend.md) shows these names in use.

A mode of one's own: [`Mode`][torchdeq_ep.extend.Mode] with `solve`, which is handed an
[`Equilibrium`][torchdeq_ep.extend.Equilibrium] and returns the error vector with a
[`NudgeReport`][torchdeq_ep.NudgeReport]; or [`StepwiseMode`][torchdeq_ep.extend.StepwiseMode] with `follow`, which is
handed a [`Path`][torchdeq_ep.extend.Path] and returns a state with its graph. Callbacks of a trainer: `deqs_of`,
`fixed_point`, `EquilibriumRule`, and of homeostasis `Direction`, `AUTO`, `TARGET`. Measuring beside training:
`Reference`, `Capture`, `left_as_found`. Commands: `require`, `write_text`, `write_whole`. Figures in the package's
look: `new_figure`, `dress`, `COLOURS`, `SHAPES`, `save`.
"""

from torchdeq_ep._options import check_choice as check_choice
from torchdeq_ep._options import check_count as check_count
from torchdeq_ep.errors import unknown_name as unknown_name
from torchdeq_ep.host import AUTO as AUTO
from torchdeq_ep.host import TARGET as TARGET
from torchdeq_ep.host import BackwardHandle as BackwardHandle
from torchdeq_ep.host import Direction as Direction
from torchdeq_ep.host import EquilibriumRule as EquilibriumRule
from torchdeq_ep.host import deqs_of as deqs_of
from torchdeq_ep.host import fixed_point as fixed_point
from torchdeq_ep.jacobian import Estimator as Estimator
from torchdeq_ep.measuring import COLOURS as COLOURS
from torchdeq_ep.measuring import SHAPES as SHAPES
from torchdeq_ep.measuring import Capture as Capture
from torchdeq_ep.measuring import Reference as Reference
from torchdeq_ep.measuring import dress as dress
from torchdeq_ep.measuring import left_as_found as left_as_found
from torchdeq_ep.measuring import new_figure as new_figure
from torchdeq_ep.measuring import require as require
from torchdeq_ep.measuring import save as save
from torchdeq_ep.measuring import write_text as write_text
from torchdeq_ep.measuring import write_whole as write_whole
from torchdeq_ep.modes import Derivative as Derivative
from torchdeq_ep.modes import Mode as Mode
from torchdeq_ep.modes import ModeLike as ModeLike
from torchdeq_ep.modes import OnDivergence as OnDivergence
from torchdeq_ep.modes import Path as Path
from torchdeq_ep.modes import RelaxedMode as RelaxedMode
from torchdeq_ep.modes import StepwiseMode as StepwiseMode
from torchdeq_ep.relaxation import find_solver as find_solver
from torchdeq_ep.state import Equilibrium as Equilibrium
from torchdeq_ep.state import cosine as cosine
from torchdeq_ep.state import norm as norm
