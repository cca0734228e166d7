"""A map recorded at its state, so that the pass that gives the parameters their gradients yields `J^T v` as well.

Implicit layers record `f` at a detached `z*`: the error vector `v` then flows into `(df/dtheta)^T v` and stops at the
state. Recorded at a state that asks for a gradient, the same pass computes `J^T v` on its way, and the node here hands
it to whoever waits. It has no gradient itself: nothing flows past the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.state import contained, container_of

_LARGE = 10_000
_NO_BACKWARD = "NotImplemented"
_CHECKPOINT = "CheckpointFunctionBackward"

Taker = Callable[[Sequence[Tensor]], None]


class Recording:
    """Who waits for `J^T v` at a recorded state; set in the backward pass, before `v` flows into the map.

    Attributes:
        taker: Called with it.
        is_hidden: Autograd knows of no way from the value to the state: `J^T v` is zero as far as it can tell.
    """

    def __init__(self) -> None:
        self.taker: Taker | None = None
        self.is_hidden = False


class _RecordedState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        # Views, so that a map that writes into its state is refused by autograd.
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        recording: Recording = ctx.recording
        if recording.taker is not None:
            taker, recording.taker = recording.taker, None
            taker(tuple(cotangent.detach() for cotangent in cotangents))
        return (None, None, *(None for _ in cotangents))


def recorded(state: Any) -> Any:
    """A state at which a map is recorded.

    Args:
        state: A detached tensor, or a list or tuple of them.

    Returns:
        The same values in the same container; they require a gradient, and keep none.

    Example:
        >>> z = recorded(torch.ones(2))
        >>> z.requires_grad, recording_of(z) is not None
        (True, True)
    """
    tensors = [state] if isinstance(state, Tensor) else list(state)
    anchor = torch.empty(0, device=tensors[0].device, requires_grad=True)
    outputs = _RecordedState.apply(Recording(), anchor, *tensors)  # type: ignore[no-untyped-call]
    return contained(container_of(state), outputs)


def recording_of(state: Any) -> Recording | None:
    """The recording of a state.

    Args:
        state: A state, recorded or not.

    Returns:
        Its recording, or `None`.
    """
    first = state if isinstance(state, Tensor) else state[0]
    found: Recording | None = getattr(first.grad_fn, "recording", None)
    return found


def depends_on_more(value: Tensor, recording: Recording | None) -> bool:
    """Whether a value has a derivative by anything but the state that it was recorded at.

    Args:
        value: Of the map.
        recording: Of the state.

    Returns:
        Whether a gradient flows from it to some other leaf.

    Example:
        >>> z, bias = recorded(torch.ones(2)), torch.ones(2, requires_grad=True)
        >>> depends_on_more(z.tanh(), recording_of(z)), depends_on_more(z + bias, recording_of(z))
        (False, True)
    """
    if recording is None:
        return value.requires_grad
    # A checkpoint has its parameters inside, where its graph does not show them.
    return any(hasattr(node, "variable") or node.name() == _CHECKPOINT for node in _nodes([value], recording))


def leaves_of(value: Tensor, recording: Recording | None) -> tuple[Tensor, ...]:
    """The leaves that a value depends on, without what the recording needed.

    Args:
        value: Of the map.
        recording: Of the state, if there is one.

    Returns:
        Parameters and inputs that require a gradient.
    """
    return tuple(node.variable for node in _nodes([value], recording) if hasattr(node, "variable"))


def reaches_state(value: Any, state: Any) -> bool:
    """Whether a backward pass can go through a map to its recorded state: one that cannot would end the user's.

    It is tried where the graph holds functions with a backward of their own, which may have none for the state.

    Args:
        value: Of the map: a tensor, or a list or tuple of them.
        state: As `recorded` returned it.

    Returns:
        Whether it can.
    """
    recording, values = recording_of(state), [value] if isinstance(value, Tensor) else list(value)
    if recording is None:
        return False
    doubtful = False
    recording.is_hidden = not any(_is_of(output.grad_fn, recording) for output in values)
    for count, node in enumerate(_nodes(values, recording)):
        if node.name() == _NO_BACKWARD:
            return False
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        doubtful = doubtful or (own and node.name() != _CHECKPOINT)
        leads = any(_is_of(following, recording) for following, _ in node.next_functions)
        recording.is_hidden = recording.is_hidden and not leads and count < _LARGE
        if count == _LARGE:
            break
    if not doubtful:
        return True
    tensors = [state] if isinstance(state, Tensor) else list(state)
    try:
        outputs = [tensor for tensor in values if tensor.requires_grad]
        zeros = [torch.zeros_like(tensor) for tensor in outputs]
        torch.autograd.grad(outputs, tensors, zeros, retain_graph=True, allow_unused=True)
    except Exception:  # whatever a backward of the user's raises, it would raise in their training
        return False
    return True


def _is_of(node: Any, recording: Recording | None) -> bool:
    return recording is not None and getattr(node, "recording", None) is recording


def _nodes(values: Sequence[Tensor], recording: Recording | None) -> Iterator[Any]:
    """The nodes of the graph of values, up to the recorded state."""
    waiting: list[Any] = [value.grad_fn for value in values]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None or _is_of(node, recording):
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
