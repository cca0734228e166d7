"""How a state, one tensor or several of any shapes, is laid out as one real tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import einops
import torch
from torch import Tensor

from torchdeq_ep.errors import MapContractError
from torchdeq_ep.state.calls import Map
from torchdeq_ep.state.rows import Rows

State = Tensor | Sequence[Tensor]
Container = type[list[Any]] | type[tuple[Any, ...]] | None
_COARSE = (torch.float16, torch.bfloat16)
_COMPUTED = (*_COARSE, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)


def tensors_of(state: State) -> list[Tensor]:
    """The tensors that a state is made of; whatever is no state is refused here.

    Args:
        state: A tensor, or a tuple or list of tensors.

    Returns:
        At least one tensor.

    Raises:
        MapContractError: If `state` is no tensor or sequence of tensors that are dense, floating or complex, and on one
            device.

    Example:
        >>> tensors_of((torch.zeros(2), torch.ones(1)))
        [tensor([0., 0.]), tensor([1.])]
        >>> tensors_of(())
        Traceback (most recent call last):
        torchdeq_ep.errors.MapContractError: a state is a tensor, or a tuple or list of tensors; got an empty tuple.
        More: torchdeq-ep errors MapContractError
    """
    given: Any = state  # by whoever does not check types
    tensors = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, Sequence) else []
    bad = [tensor for tensor in tensors if not isinstance(tensor, Tensor)]
    if bad or not tensors:
        got = f"{'an empty ' if isinstance(given, Sequence) else ''}{type(given).__name__}"
        if bad:
            got = f"a {type(given).__name__} with {type(bad[0]).__name__} in it"
        raise MapContractError(f"a state is a tensor, or a tuple or list of tensors; got {got}.{_instead(given)}")
    _check_layout(tensors, "")
    for tensor in tensors:
        if tensor.dtype not in _COMPUTED:
            raise MapContractError(f"a state must be floating or complex, not {tensor.dtype}: call .float() on it.")
    devices = {str(tensor.device): None for tensor in tensors}
    if len(devices) > 1:
        raise MapContractError(f"the tensors of a state must be on one device, not on {' and '.join(devices)}.")
    return tensors


def _check_layout(tensors: Sequence[Tensor], source: str) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            remedy = "pad it, or make each of its tensors one of the state" if tensor.is_nested else "call .to_dense()"
            raise MapContractError(
                f"{source + ' returned' if source else 'a state has'} a tensor (number {i}) that is {kind}, but states "
                f"are dense: {remedy}."
            )


def container_of(state: State) -> Container:
    """What a state comes in: `None` for a bare tensor, `list`, `tuple`, or a namedtuple."""
    if isinstance(state, Tensor):
        return None
    return type(state) if hasattr(state, "_fields") else list if isinstance(state, list) else tuple  # type: ignore[return-value]


def contained(container: Container, tensors: Sequence[Tensor]) -> State:
    """Tensors in such a container.

    Example:
        >>> contained(tuple, [torch.zeros(1)]), contained(None, [torch.zeros(1)])
        ((tensor([0.]),), tensor([0.]))
    """
    if container is None:
        return tensors[0]
    return container(*tensors) if hasattr(container, "_fields") else container(tensors)


@dataclass(frozen=True)
class Packing:
    """How a state, one tensor or several of any shapes, is laid out as a single real tensor.

    A single real tensor stays as it is. Several are flattened and joined to one vector, so nothing is assumed about
    their first dimensions. Complex ones become pairs of reals: the cotangent PyTorch hands over for `z` is
    `dL/dRe z + i dL/dIm z`, the gradient with respect to exactly these pairs.

    Args:
        container: `list`, `tuple`, a namedtuple, or `None` for a bare tensor.
        shapes: Shape of each tensor.
        dtypes: Dtype of each tensor.
        lenient: The forward pass runs under autocast: keep states in float32 at least, and cast values of `f` in
            another floating dtype.

    Example:
        >>> packing = Packing.of((torch.zeros(2), torch.zeros(1, 2)))
        >>> packing.pack((torch.ones(2), torch.zeros(1, 2)))
        tensor([1., 1., 0., 0.])
        >>> packing.unpack(torch.arange(4.0))
        (tensor([0., 1.]), tensor([[2., 3.]]))
    """

    container: Container
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    lenient: bool = False

    @classmethod
    def of(cls, state: State, lenient: bool = False) -> Packing:
        """The packing of states like `state`.

        Args:
            state: A tensor, or a tuple or list of tensors.
            lenient: See the class.

        Returns:
            The packing.

        Raises:
            MapContractError: If it is no state: a floating or complex tensor, or a sequence of such.
        """
        tensors = tensors_of(state)
        container = container_of(state)
        dtypes = tuple(torch.float32 if lenient and t.dtype in _COARSE else t.dtype for t in tensors)
        return cls(container, tuple(t.shape for t in tensors), dtypes, lenient)

    def pack(self, state: State, source: str = "f") -> Tensor:
        """One real tensor from a state (or from a value of `f`, or a cotangent).

        Args:
            state: As many tensors as the packing has, of the same shapes.
            source: What the error message says returned the state.

        Returns:
            The tensor itself if the state is one real tensor, else a vector.

        Raises:
            MapContractError: If number, shapes or dtypes differ, or a tensor is sparse or nested.
        """
        tensors = [state] if isinstance(state, Tensor) else state
        if not isinstance(tensors, Sequence) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise MapContractError(f"{source} returned {type(state).__name__}, but a state is made of tensors.")
        if len(tensors) != len(self.shapes):
            raise MapContractError(
                f"{source} returned {len(tensors)} tensors for a state of {len(self.shapes)}: "
                "it must map a state to a state."
            )
        tensors = list(tensors)
        _check_layout(tensors, source)
        for i, (tensor, shape, dtype) in enumerate(zip(tensors, self.shapes, self.dtypes, strict=True)):
            if tensor.shape != shape:
                raise MapContractError(
                    f"{source} returned shape {tuple(tensor.shape)} where the state (tensor {i}) has {tuple(shape)}: "
                    "it must keep the shape of every state tensor. Check for a reshape, a broadcast or a stride in it."
                )
            if tensor.dtype != dtype:
                if tensor.is_complex() and not dtype.is_complex:
                    continue  # a real state evaluated at a complex node
                if not self.lenient or tensor.is_complex() != dtype.is_complex:
                    raise MapContractError(
                        f"{source} returned {tensor.dtype} where the state (tensor {i}) is {dtype}: cast one of them, "
                        "or run the forward pass under torch.autocast if the change of dtype is meant."
                    )
                tensors[i] = tensor.to(dtype)
        if self._is_plain:
            return tensors[0]
        # Not view_as_real: its backward takes no gradient at an odd offset, and it refuses an unresolved conjugate.
        flat = [
            torch.stack((t.real, t.imag), -1) if d.is_complex else t for t, d in zip(tensors, self.dtypes, strict=True)
        ]
        vector, _ = einops.pack(flat, "*")
        return vector

    def unpack(self, packed: Tensor) -> State:
        """The state that a packed tensor stands for: the inverse of [`pack`][torchdeq_ep.state.Packing.pack].

        Args:
            packed: A tensor as `pack` returns it.

        Returns:
            A tensor, or a list or tuple, as the packing was made from.
        """
        if self._is_plain:
            return self._wrap([packed])
        shapes: list[tuple[int, ...] | list[int]] = [
            (*shape, 2) if dtype.is_complex else tuple(shape)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        tensors = einops.unpack(packed, shapes, "*")
        whole = [
            torch.complex(t[..., 0], t[..., 1]) if d.is_complex else t
            for t, d in zip(tensors, self.dtypes, strict=True)
        ]
        if not packed.is_complex():
            whole = [t.to(d) for t, d in zip(whole, self.dtypes, strict=True)]
        return self._wrap(whole)

    def restore(self, packed: Tensor, like: State) -> State:
        """The state that a packed tensor stands for, in the dtypes of `like`, which autocast may have made coarser.

        Args:
            packed: A tensor as `pack` returns it.
            like: A state with the dtypes wanted.

        Returns:
            The state.
        """
        state = self.unpack(packed)
        if isinstance(state, Tensor) or isinstance(like, Tensor):
            return cast(Tensor, state).to(cast(Tensor, like).dtype)
        return self._wrap([tensor.to(other.dtype) for tensor, other in zip(state, like, strict=True)])

    @property
    def rows(self) -> Rows | None:
        """Where the samples lie, if the first dimension of every tensor is one of samples; `None` if it cannot be."""
        counts = {shape[0] if shape else 0 for shape in self.shapes}
        if len(counts) != 1 or min(counts) < 2 or not all(shape.numel() for shape in self.shapes):
            return None
        (count,) = counts
        pairs = [2 if dtype.is_complex else 1 for dtype in self.dtypes]
        return Rows(count, tuple(shape.numel() // count * pair for shape, pair in zip(self.shapes, pairs, strict=True)))

    @property
    def _is_plain(self) -> bool:
        return len(self.shapes) == 1 and not self.dtypes[0].is_complex

    def _wrap(self, tensors: list[Tensor]) -> State:
        return contained(self.container, tensors)

    def map(self, f: Callable[..., Any]) -> Map:
        """`f` as a map of packed states.

        Args:
            f: A map of states. Several tensors are passed as `f(*state)`, as torchdeq does, or as one sequence if `f`
                takes exactly one required argument.

        Returns:
            A function from a packed state to a packed state.
        """
        step = self.state_map(f)

        def packed_map(packed: Tensor) -> Tensor:
            return self.pack(step(self.unpack(packed)))

        return packed_map

    def state_map(self, f: Callable[..., Any]) -> Callable[[State], State]:
        """`f` as a map of states as they are, one argument in the container of this packing.

        Args:
            f: As for [`map`][torchdeq_ep.state.Packing.map].

        Returns:
            A function from a state to what `f` returns.
        """
        spread = self.container is not None and not _takes_sequence(f, len(self.shapes))
        return (lambda state: cast(State, f(*state))) if spread else f


def _instead(given: Any) -> str:
    """What to give in place of what is no state."""
    if isinstance(given, Mapping):
        return " Give its values as a tuple, and let f take and return them in that order."
    return " The map comes first, and then the state." if callable(given) else ""


def _takes_sequence(f: Callable[..., Any], n_tensors: int) -> bool:
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if n_tensors == 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return False
    return sum(p.default is p.empty for p in positional) == 1
