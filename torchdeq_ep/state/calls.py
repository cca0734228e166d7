"""Calling `f` again, in the backward pass, without leaving a trace.

A nudged phase calls the user's map many times. None of these calls may move batch-norm statistics or build an
autograd graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Map = Callable[[Tensor], Tensor]
STATEFUL = (
    "Look for dropout in train mode (use torchdeq's VariationalDropout, which keeps its mask, and set that inside "
    "attention and encoder layers to 0), random noise, a layer that updates its state on every call, or a map that "
    "works in place on its argument."
)
_STATISTICS: dict[Callable[..., Tensor], str] = {
    functional.batch_norm: "training",
    functional.instance_norm: "use_input_stats",
}
_SIGNATURES = {norm: inspect.signature(norm) for norm in _STATISTICS}
_COUNTING = (torch.Tensor.add_, torch.Tensor.__iadd__)


class FrozenStatistics(TorchFunctionMode):
    """Inside this context, normalisation layers in training mode use batch statistics but do not record them.

    The running mean and variance are withheld from the call, which leaves its result unchanged; the counter of batches
    seen is put back on exit. Any other code runs as it is.

    Example:
        >>> norm = torch.nn.BatchNorm1d(2).train()
        >>> with FrozenStatistics():
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """

    def __init__(self) -> None:
        super().__init__()
        self.withheld = False
        """Whether any layer would have recorded its statistics."""
        self._counters: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _STATISTICS:
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            call = bound.arguments
            if call["running_mean"] is not None and call[_STATISTICS[func]]:
                self.withheld = True
                return func(**{**call, "running_mean": None, "running_var": None})
        if func in _COUNTING and args[0].dim() == 0 and args[0].dtype == torch.int64:
            if torch._C._are_functorch_transforms_active():  # which refuse to write into what a map holds
                self.withheld = True
                return args[0]
            self._counters.setdefault(id(args[0]), (args[0], args[0].clone()))
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for counter, before in self._counters.values():
            counter.copy_(before)
        self._counters.clear()


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type, to evaluate `f` later as it was evaluated now.

    Args:
        device_type: As for `torch.autocast`, e.g. `"cuda"`.
        enabled: Whether it was on.
        dtype: Its dtype, also if it was off.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     found = Autocast.current("cpu")
        >>> with found.restored(True):
        ...     torch.is_autocast_enabled("cpu")
        True
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        """The state in force here, for `device_type`.

        Args:
            device_type: As for `torch.autocast`.

        Returns:
            The state.
        """
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    @contextmanager
    def restored(self, enabled: bool) -> Iterator[None]:
        """A context with this state, or with autocast off if `enabled` is false.

        Args:
            enabled: Whether autocast may be on.

        Yields:
            Nothing.
        """
        forget_casts()
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=enabled and self.enabled):
            yield


class CountedMap:
    """A map that counts its calls.

    Args:
        f: The map.

    Example:
        >>> counted = CountedMap(torch.cos)
        >>> counted(torch.zeros(1)), counted.calls
        (tensor([1.]), 1)
    """

    def __init__(self, f: Map) -> None:
        self._f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self._f(z)


def forget_casts() -> None:
    """Before `f` is recorded: have autocast cast the parameters anew.

    It keeps those it has cast, and solvers call `f` without autograd. Up to torch 2.8 at least, what was cast there is
    used again where autograd is on, and then the parameters get no gradient.
    """
    torch.clear_autocast_cache()


@contextmanager
def undisturbed(guarded: bool = True) -> Iterator[FrozenStatistics]:
    """A context in which calls of `f` change no running statistics and build no graph.

    The random state needs no guard: a map that draws from it has no fixed point, and is refused where it is noticed.

    Args:
        guarded: Whether `f` may record statistics. The guard costs some microseconds per operation, so a map whose
            first evaluation withheld nothing is called without it from then on.

    Yields:
        The guard, which knows whether anything was withheld.

    Example:
        >>> norm = torch.nn.BatchNorm1d(2).train()
        >>> with undisturbed() as guard:
        ...     value = norm(torch.randn(8, 2))
        >>> value.requires_grad, guard.withheld, norm.running_mean
        (False, True, tensor([0., 0.]))
    """
    frozen = FrozenStatistics()
    with torch.no_grad(), frozen if guarded else nullcontext():
        yield frozen


def change_tolerance(eps: float) -> float:
    """Relative difference between two values of `f` at one state that rounding alone does not explain.

    Args:
        eps: Relative rounding error of one call of `f`.

    Returns:
        A thousand times that, but no less than 1e-9 and no more than 5 %.

    Example:
        >>> change_tolerance(2e-16), change_tolerance(1e-3)
        (1e-09, 0.05)
    """
    return min(max(1e3 * eps, 1e-9), 0.05)
