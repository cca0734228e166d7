"""Every exception and warning that torchdeq_ep raises on purpose.

All errors derive from [`EPError`][torchdeq_ep.errors.EPError] and all warnings from
[`EPWarning`][torchdeq_ep.errors.EPWarning], so one `except` or one warning filter catches the lot. Each message
says what happened, where, and what to do about it. Its last line is the command that prints the entry of its class in
the documentation, also where there is no network.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import Tensor

_POINTER = "\nMore: torchdeq-ep errors {}"
_ANY_POINTER = re.compile(_POINTER.format(r"\w+"))


class _Explained(BaseException):
    """Ends its message with a pointer to the documentation of its class, and of no other whose message it quotes."""

    def __str__(self) -> str:
        message = _ANY_POINTER.sub("", super().__str__())
        kind = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("torchdeq_ep"))
        return message + _POINTER.format(kind.__name__) if message else message


class EPError(_Explained, Exception):
    """Base class of all errors raised by torchdeq_ep."""


class UnknownBackwardError(EPError, ValueError):
    """A backward mode was asked for by a name that nobody registered."""


class InvalidOptionError(EPError, ValueError):
    """An option has a name or a value that its function does not accept."""


class DataError(InvalidOptionError):
    """A file of images is missing, is no Parquet file, or has a column or a row that cannot be used."""


class NoDEQError(EPError, ValueError):
    """A module was to be switched that holds no torchdeq DEQ whose backward can be switched."""


class MapContractError(EPError, ValueError):
    """The map `f` returned something else than a state of the shape and dtype it was given."""


class MapChangedError(EPError, RuntimeError):
    """The map `f` is another function in the backward pass than it was in the forward pass."""


class StochasticMapError(EPError, RuntimeError):
    """The map `f` gives different answers for the same state."""


class NonFiniteError(EPError, RuntimeError):
    """NaN or infinity in a state or a cotangent."""


class NudgeDivergedError(EPError, RuntimeError):
    """A nudged phase left every neighbourhood of the free state, at every amplitude that was tried."""


class NotHolomorphicError(EPError, RuntimeError):
    """A complex nudge was asked of a map that cannot be evaluated at complex states."""


class JacobianProductError(EPError, RuntimeError):
    """A mode needs products with the Jacobian of a map that offers none."""


class MissingHistoryError(EPError, RuntimeError):
    """A mode needs what another solver, or a loop of this package, would have kept of the forward pass."""


class DoubleBackwardError(EPError, RuntimeError):
    """A second derivative was asked of an equilibrium whose backward pass defines only the first."""


class TransformError(EPError, RuntimeError):
    """A transform of `torch.func`, or a forward derivative, was asked of an equilibrium that cannot serve it."""


class SolverError(EPError, RuntimeError):
    """A black-box solver failed: it raised, or did what one of the derived classes names.

    Args:
        message: What happened, where, and what to do.
        nudge: The amplitude of the call that failed, 0 in the free phase; an attribute of the error.
        current: The force that was added in it, or `None`; an attribute of the error.
    """

    def __init__(self, message: str = "", *, nudge: float = 0.0, current: Tensor | None = None) -> None:
        super().__init__(message)
        self.nudge = nudge
        self.current = current


class SolverTimeoutError(SolverError, TimeoutError):
    """A black-box solver did not return within its time-out."""


class SolverNonFiniteError(SolverError, NonFiniteError):
    """A black-box solver returned NaN or infinity."""


class SolverShapeError(SolverError, MapContractError):
    """A black-box solver returned something else than a real array of the shape of the state."""


class LawMismatchError(EPError, RuntimeError):
    """The force law given for a black box is not that of the system that its solver solves."""


class MissingDependencyError(EPError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class PluginError(EPError, ImportError):
    """Something was asked for by name that another distribution provides, and that cannot be imported."""


class EPWarning(_Explained, UserWarning):
    """Base class of all warnings issued by torchdeq_ep."""


class ConvergenceWarning(EPWarning):
    """A free or nudged phase stopped before it reached its tolerance; the gradient is approximate."""


class FallbackWarning(EPWarning):
    """A nudged phase failed and implicit differentiation took its place, as `on_divergence="ift"` asks."""


class PrecisionWarning(EPWarning):
    """The dtype of the state is too coarse for the requested stencil."""


class TruncationWarning(EPWarning):
    """A nudge is so large that the error vector is not that of its limit: it bends, or it crosses kinks."""


class HiddenDerivativeWarning(EPWarning):
    """The derivative that autograd has of `f` is not that of its values: `f` hides a part of it."""


class AsymmetryWarning(EPWarning):
    """The error vector of equilibrium propagation is far from the exact one, because the Jacobian is not symmetric."""


class NoGradientWarning(EPWarning):
    """A switched DEQ was called in evaluation mode with autograd on: it has no gradient there."""


class ReconstructionWarning(EPWarning):
    """Reversible steps could not be taken back precisely enough: rounding grows with every one of them."""


class LossMismatchWarning(EPWarning):
    """The loss given to `nudge_loss` is not the loss whose gradient reached the layer."""


class MeasurementSkippedWarning(EPWarning):
    """A monitor could not measure at some step of a training; the training goes on as it would have without it."""


class PluginWarning(EPWarning):
    """Another distribution that extends this package is broken; everything goes on without it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist: what does, and which of them is nearest.

    Args:
        kind: What is being named, e.g. `"backward mode"`.
        name: The name as received.
        known: The names that exist.

    Returns:
        One sentence, with a second one if a known name is close to the received one.

    Example:
        >>> unknown_name("colour", "gren", ["red", "green"])
        "unknown colour 'gren'; there are: green, red. Did you mean 'green'?"
    """
    names = sorted(known)
    message = f"unknown {kind} {name!r}; there are: {', '.join(names) or 'none'}."
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"{message} Did you mean {near[0]!r}?" if near else message
