"""Gradient descent on a penalty beside an optimiser, apart from the scale by which that divides gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

LARGEST_CHANGE, LARGEST_SHARE = 0.1, 1.0


class Descent:
    """A step of gradient descent on a penalty after each step of an optimiser.

    The penalty `P` is the mean of a square, and zero is in reach of networks whose weights can become symmetric. Then a
    step along its gradient `G` comes nearest to every such minimum at the length `2 P / |G|^2`, which is Polyak's
    (1987, sec. 5.3), doubled since `P` is quadratic; [eq. (25)][eq-25]. It knows neither a learning rate nor the size
    of the state, nor a unit of the penalty. Where zero is out of reach it would grow without bound, so the shortest so
    far is taken (Loizou et al. 2021, arXiv 2002.10542), and no step changes the parameters by more than a tenth of
    their norm. Times a share, and the share of its highest learning rate at which the optimiser goes.

    Args:
        optimizer: It moves the parameters that this has, and no others.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.share = 0.0
        self.length = math.inf
        self.highest = 0.0
        self._forget()

    def _forget(self) -> None:
        self._passes, self._value = 0, 0.0
        self._gradients: dict[Tensor, Tensor] = {}

    def parameters(self) -> list[Tensor]:
        """What it moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def add(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], value: float) -> None:
        """Keep the gradients of one pass until the next step.

        Args:
            leaves: What the penalty depends on.
            gradients: Of the penalty by each.
            value: The penalty.
        """
        self._passes, self._value = self._passes + 1, self._value + value
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                kept = self._gradients.get(leaf)
                self._gradients[leaf] = gradient.detach() if kept is None else kept + gradient.detach()

    def register(self) -> RemovableHandle:
        """Follow the optimiser."""
        return self.optimizer.register_step_post_hook(self._step)

    def state_dict(self) -> dict[str, float]:
        """Where it stands."""
        return {"length": self.length, "highest": self.highest}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self.length, self.highest = state.get("length", math.inf), state.get("highest", 0.0)

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters, passes = self.parameters(), max(self._passes, 1)
        gradients = [None if g is None else g / passes for g in map(self._gradients.get, parameters)]
        value, share, gradients = _everywhere(self._value / passes, self.share, gradients, parameters)
        self._forget()
        follows = self._share_of_rate()
        moved = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        if not moved:
            return
        sizes, steeps = (_norms([pair[k] for pair in moved]) for k in (0, 1))
        steepness, size = float(steeps.norm()), float((sizes * (steeps > 0)).norm())
        if not 0 < steepness < math.inf or not math.isfinite(value):
            return
        self.length = min(self.length, 2 * value / steepness**2)
        length = min(share * follows * self.length, LARGEST_CHANGE * size / steepness)
        for parameter, gradient in moved:
            parameter.sub_(gradient.to(parameter.dtype), alpha=length)

    def _share_of_rate(self) -> float:
        """At which share of its highest learning rate the optimiser goes, by its group of the highest."""
        groups = self.optimizer.param_groups
        peaks = [max(group.get("initial_lr", 0.0), group.get("max_lr", 0.0), group["lr"]) for group in groups]
        self.highest = max(self.highest, *map(float, peaks))
        return max(float(group["lr"]) for group in groups) / self.highest if self.highest > 0 else 0.0


def _everywhere(
    value: float, share: float, gradients: list[Tensor | None], parameters: Sequence[Tensor]
) -> tuple[float, float, list[Tensor | None]]:
    """The means over all processes: replicas are to stay equal."""
    if not parameters or not (distributed.is_available() and distributed.is_initialized()):
        return value, share, gradients
    # Every process has to take part, for every parameter, also one through which no loss of its own has come.
    tensors = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    numbers = parameters[0].new_tensor([value, share], dtype=torch.float32)
    for tensor in [numbers, *tensors]:
        distributed.all_reduce(tensor)
    count = distributed.get_world_size()
    return *(numbers / count).tolist(), [tensor / count for tensor in tensors]


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each, on the device of the first, in the widest precision of all and in single precision at least."""
    device, wide = tensors[0].device, reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return torch.stack([t.to(wide).norm().to(device) for t in tensors])
