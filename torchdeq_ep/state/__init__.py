"""The state of an implicit layer as one real tensor, its equilibrium, and calls of `f` that leave no trace."""

from torchdeq_ep.state.calls import STATEFUL as STATEFUL
from torchdeq_ep.state.calls import Autocast as Autocast
from torchdeq_ep.state.calls import FrozenStatistics as FrozenStatistics
from torchdeq_ep.state.calls import Map as Map
from torchdeq_ep.state.calls import change_tolerance as change_tolerance
from torchdeq_ep.state.calls import forget_casts as forget_casts
from torchdeq_ep.state.calls import undisturbed as undisturbed
from torchdeq_ep.state.derivatives import first_derivative_only as first_derivative_only
from torchdeq_ep.state.derivatives import forward_derivative as forward_derivative
from torchdeq_ep.state.equilibrium import Equilibrium as Equilibrium
from torchdeq_ep.state.memory import Memory as Memory
from torchdeq_ep.state.norms import cosine as cosine
from torchdeq_ep.state.norms import in_the_middle as in_the_middle
from torchdeq_ep.state.norms import largest_row_norm as largest_row_norm
from torchdeq_ep.state.norms import norm as norm
from torchdeq_ep.state.norms import relative_difference as relative_difference
from torchdeq_ep.state.norms import row_dots as row_dots
from torchdeq_ep.state.norms import row_norms as row_norms
from torchdeq_ep.state.packing import Packing as Packing
from torchdeq_ep.state.packing import State as State
from torchdeq_ep.state.packing import tensors_of as tensors_of
from torchdeq_ep.state.rows import Rows as Rows
from torchdeq_ep.state.rows import are_independent as are_independent
