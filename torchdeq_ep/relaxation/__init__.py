"""From a map of a stack of nodes to its fixed point, by the loop of this package or any solver of torchdeq."""

from torchdeq_ep.relaxation.driven import Solver as Solver
from torchdeq_ep.relaxation.krylov import gmres as gmres
from torchdeq_ep.relaxation.loop import FindRows as FindRows
from torchdeq_ep.relaxation.loop import Relaxation as Relaxation
from torchdeq_ep.relaxation.loop import Step as Step
from torchdeq_ep.relaxation.loop import iterate as iterate
from torchdeq_ep.relaxation.phases import Enough as Enough
from torchdeq_ep.relaxation.solvers import GMRES as GMRES
from torchdeq_ep.relaxation.solvers import Product as Product
from torchdeq_ep.relaxation.solvers import Run as Run
from torchdeq_ep.relaxation.solvers import check_solver as check_solver
from torchdeq_ep.relaxation.solvers import find_solver as find_solver
from torchdeq_ep.relaxation.solvers import relax as relax
from torchdeq_ep.relaxation.solvers import relax_linear as relax_linear
