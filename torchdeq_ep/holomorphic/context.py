"""The mode that evaluates real modules at complex states, and its refusals."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, resolve_name

from torchdeq_ep.errors import InvalidOptionError, NotHolomorphicError
from torchdeq_ep.holomorphic.registry import CannotContinueError, Kind, Operation, Policy, find_policy
from torchdeq_ep.state import FrozenStatistics

Piecewise = Literal["real-part"]


_PACKAGES = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, os.path.dirname(__file__)))


_ALTERNATIVES = (
    "Instead, use a stencil with real nodes ('ep', or 'ep-richardson' for high order), which works on any f; or "
    "replace the operation by an analytic one (torchdeq_ep.nn has activations and pooling)."
)


_MAY_BE_REAL = ("metadata", "new tensors")


@dataclass(frozen=True)
class Crossing:
    """How many units of a piecewise operation may have left their piece.

    Args:
        operation: Name of the operation, e.g. `relu`.
        units: Units evaluated at complex states, all calls and all nodes together.
        crossed: Those of them nearer to the kink in the real than in the imaginary direction.

    Example:
        >>> with mode(piecewise="real-part") as context:
        ...     _ = torch.relu(torch.tensor([1 + 2j, 3 - 1j]))
        >>> context.crossings
        (Crossing(operation='relu', units=2, crossed=1),)
    """

    operation: str
    units: int
    crossed: int


class HolomorphicMode(FrozenStatistics):
    """The context that [`mode`][torchdeq_ep.holomorphic.mode] makes; see there.

    Args:
        piecewise: `"real-part"`, or `None` to refuse piecewise analytic operations.

    Example:
        >>> with HolomorphicMode() as context:
        ...     torch.sigmoid(torch.tensor(0j))
        tensor(0.5000+0.j)
        >>> context.crossings
        ()
    """

    def __init__(self, piecewise: Piecewise | None = None) -> None:
        super().__init__()
        self.piecewise = piecewise
        self._crossings: dict[str, list[Tensor | int]] = {}
        self._around: list[HolomorphicMode] = []
        self._suspensions = 0

    def __enter__(self) -> HolomorphicMode:
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._around = [active for active in stack if isinstance(active, HolomorphicMode) and active is not self]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """What the piecewise operations did so far, one entry for each that was called at a complex state."""
        return tuple(Crossing(name, int(units), int(crossed)) for name, (units, crossed) in self._crossings.items())

    def __torch_function__(
        self,
        func: Operation,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._suspensions:
            return func(*args, **(kwargs or {}))
        if not _any_complex(args) and not (kwargs and _any_complex(kwargs.values())):
            return super().__torch_function__(func, types, args, kwargs)
        kwargs = dict(kwargs or {})
        policy = find_policy(func)
        if policy is None:
            if func is torch.autograd.grad:
                return self._gradient(*args, **kwargs)
            self._refuse(
                _display_name(func, None),
                "has no rule for complex arguments",
                "If it is analytic, teach it with torchdeq_ep.holomorphic.register_rule(op, rule). ",
            )
        target = args[0] if policy.is_inplace and args else kwargs.get("out")
        if isinstance(target, Tensor) and not target.is_complex():
            self._refuse(
                _display_name(func, policy),
                "writes a complex value into a real tensor, which would drop the imaginary part",
                "Make the buffer with torch.zeros_like(z) or z.new_zeros(...), or build the value out of place. ",
            )
        return self._apply(func, policy, args, kwargs)

    def _apply(self, func: Operation, policy: Policy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if policy.kind is Kind.NATIVE:
            dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
            drops = any(not dtype.is_complex for dtype in dtypes)
            value = None if drops else func(*args, **kwargs)
            if policy.group not in _MAY_BE_REAL and _any_complex(args[:1]) and (drops or _is_real(value)):
                self._refuse(_display_name(func, policy), "casts to a real dtype here, which drops the imaginary part")
            return func(*args, **kwargs) if drops else value
        if policy.kind is Kind.EXPANDED and policy.apply is not None:
            with self:
                return policy.apply(*args, **kwargs)
        if policy.kind is Kind.REFUSED or policy.apply is None:
            self._refuse(_display_name(func, policy), f"is not holomorphic: {policy.note}")
        if policy.kind is Kind.GATED and self.piecewise is None:
            self._refuse(
                _display_name(func, policy),
                "is only piecewise analytic",
                "If no unit crosses its kink, allow it with torchdeq_ep.holomorphic.mode(piecewise='real-part'). ",
            )
        leading = (functools.partial(self._count, policy.name),) if policy.kind is Kind.GATED else ()
        out = kwargs.pop("out", None)
        try:
            with _suspended(self._around) if self._around else nullcontext():
                value = policy.apply(*leading, *args, **kwargs)
        except CannotContinueError as error:
            self._refuse(_display_name(func, policy), f"cannot be continued to these complex arguments: {error}")
        if policy.is_inplace:
            return args[0].copy_(value)
        return value if out is None else out.copy_(value)

    def _gradient(self, outputs: Any, inputs: Any, grad_outputs: Any = None, **kwargs: Any) -> Any:
        """`torch.autograd.grad`, e.g. of an energy: PyTorch's is the conjugate of the complex derivative."""
        wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if not all(tensor.is_complex() for tensor in wanted):
            self._refuse("torch.autograd.grad", "of a complex output with respect to a real tensor is not holomorphic")
        values = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        with _suspended(self._around):
            if grad_outputs is None:
                weights: list[Tensor | None] = [torch.ones_like(value) for value in values]
            else:
                given = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
                weights = [None if weight is None else _conjugate(weight) for weight in given]
            gradients = torch.autograd.grad(values, wanted, weights, **kwargs)
            return tuple(gradient if gradient is None else _conjugate(gradient) for gradient in gradients)

    def _count(self, name: str, distance: Tensor) -> None:
        crossed = _physical(distance.real.abs() < distance.imag.abs())
        total = self._crossings.setdefault(name, [0, 0])
        total[0] += crossed.numel()
        total[1] = total[1] + crossed.sum()

    def _refuse(self, name: str, what: str, advice: str = "") -> NoReturn:
        raise NotHolomorphicError(f"{name} {what}. {_location()} {advice}{_ALTERNATIVES}")


def mode(piecewise: Piecewise | None = None) -> HolomorphicMode:
    """A context in which real modules and closures can be evaluated at complex states.

    Nothing about them changes: parameters stay real, and each operation that meets a complex argument is replaced by
    its analytic continuation. An operation without one, or without a known one, raises an error that names it, the
    module and the line. Operations on real tensors are left alone, except that normalisation layers record no
    statistics.

    The context is thread-local, can be nested in and around `torch.vmap`, and its overhead is a table look-up for each
    call of PyTorch. Code compiled by `torch.jit` runs unseen by it.

    Args:
        piecewise: `"real-part"` allows piecewise analytic operations (ReLU and its kin, `abs`, `clamp`, max pooling,
            maxima, comparisons): the piece is chosen by the real part. That is the analytic continuation only while no
            unit crosses its kink along the contour; `crossings` of the context counts those that may have.

    Returns:
        The context.

    Raises:
        InvalidOptionError: If `piecewise` is something else.
        NotHolomorphicError: Inside the context, if an operation cannot be continued.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())
        >>> with torch.no_grad(), mode():
        ...     layer(torch.zeros(1, 3, dtype=torch.complex64)).dtype
        torch.complex64
        >>> with mode(piecewise="real-part") as context:
        ...     torch.relu(torch.tensor([1 + 2j, 3 - 1j, -1 + 0j]))
        tensor([1.+2.j, 3.-1.j, 0.+0.j])
        >>> context.crossings
        (Crossing(operation='relu', units=3, crossed=1),)
    """
    if piecewise not in (None, "real-part"):
        raise InvalidOptionError(f"piecewise must be None or 'real-part', not {piecewise!r}.")
    return HolomorphicMode(piecewise)


@dataclass(frozen=True)
class HolomorphicMap:
    """`f` that can be called at complex states: inside the mode there, and as it is at real ones.

    Args:
        f: A function of tensors. The wrapper can be pickled if it can.
        piecewise: As for [`mode`][torchdeq_ep.holomorphic.mode].

    Example:
        >>> f = HolomorphicMap(torch.relu, piecewise="real-part")
        >>> f(torch.tensor(2 + 1j))
        tensor(2.+1.j)
    """

    f: Callable[..., Any]
    piecewise: Piecewise | None = None

    def __call__(self, *args: Any) -> Any:
        """`f(*args)`, continued if one of the tensors is complex."""
        if not _any_complex(args):
            return self.f(*args)
        with mode(self.piecewise):
            return self.f(*args)


def holomorphic_map(f: Callable[..., Any], piecewise: Piecewise | None = None) -> HolomorphicMap:
    """Wraps `f` so that it can be called at complex states, at no cost for real ones.

    Args:
        f: A function of tensors, or a module.
        piecewise: As for [`mode`][torchdeq_ep.holomorphic.mode].

    Returns:
        The wrapped function; it can be pickled and compared if `f` can.

    Example:
        >>> f = holomorphic_map(torch.nn.functional.silu)
        >>> f(torch.tensor(0.5)), f(torch.tensor(0.5 + 0j))
        (tensor(0.3112), tensor(0.3112+0.j))
    """
    return HolomorphicMap(f, piecewise)


def real_part(z: Tensor) -> Tensor:
    """The real part, by which a piecewise formula chooses its piece: inside a mode, PyTorch's own is refused.

    Args:
        z: Real or complex tensor.

    Returns:
        A real tensor of the same shape.

    Example:
        >>> with mode():
        ...     real_part(torch.tensor([1 + 2j]))
        tensor([1.])
    """
    with torch._C.DisableTorchFunction():
        return z.real


@contextmanager
def _suspended(modes: list[HolomorphicMode]) -> Iterator[None]:
    """Rules take real and imaginary parts, which the modes around this one would refuse."""
    for outer in modes:
        outer._suspensions += 1
    try:
        yield
    finally:
        for outer in modes:
            outer._suspensions -= 1


def _any_complex(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_complex():
                return True
        elif isinstance(value, list | tuple) and _any_complex(value):
            return True
    return False


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _conjugate(tensor: Tensor) -> Tensor:
    # Neither kind of torch.conj can be batched by torch.vmap everywhere.
    return torch.complex(tensor.real, -tensor.imag) if tensor.is_complex() else tensor


def _physical(tensor: Tensor) -> Tensor:
    """The tensor with all its vmap dimensions: inside torch.vmap a count would belong to one sample."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _display_name(func: Operation, policy: Policy | None) -> str:
    owner = getattr(func, "__self__", None)
    if getattr(func, "__name__", "") in ("__get__", "__set__") and owner is not None:
        return f"Tensor.{getattr(owner, '__name__', policy.name if policy else 'property')}"
    known: str | None = resolve_name(func)
    if known:
        return known.replace("torch.Tensor.", "Tensor.")
    return policy.name if policy else str(getattr(func, "__qualname__", func))


def _location() -> str:
    """Where the operation was called: the module, and the first line outside PyTorch and this package."""
    place = _place(traceback.walk_stack(sys._getframe(1)))
    return f"It was called {place}."


def location_of(error: BaseException) -> str:
    """Where an error was raised: the module, and the innermost line outside PyTorch and this package.

    Args:
        error: As it was caught.

    Returns:
        A sentence.
    """
    place = _place(reversed(list(traceback.walk_tb(error.__traceback__))))
    return f"It was raised {place}." if place else ""


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The place that frames lie in, the innermost first."""
    modules: list[nn.Module] = []
    line = ""
    for frame, number in frames:
        code = frame.f_code
        if not line and not code.co_filename.startswith((*_PACKAGES, "<frozen")):
            source = linecache.getline(code.co_filename, number).strip()
            line = f"at {code.co_filename}:{number}" + (f" ({source})" if source else "")
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and (not modules or modules[-1] is not owner):
                modules.append(owner)
    where = f"in module {_module_path(modules)}" if modules else ""
    return ", ".join(filter(None, (where, line)))


def _module_path(modules: list[nn.Module]) -> str:
    """The path of the innermost module within the outermost one that contains it, innermost first in `modules`."""
    innermost, path = modules[0], ""
    child = innermost
    root = innermost
    for parent in modules[1:]:
        names = [name for name, module in parent.named_modules() if module is child]
        if not names:
            break
        path = f"{names[0]}.{path}" if path else names[0]
        child = root = parent
    kind = type(innermost).__qualname__
    return f"{type(root).__qualname__}.{path} ({kind})" if path else kind
