"""Homeostasis in random directions: the hook of one DEQ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torchdeq.core import DEQBase

from torchdeq_ep.host.deqs import fixed_point
from torchdeq_ep.host.descent import LARGEST_SHARE, Descent
from torchdeq_ep.host.injection import (
    Nothing,
    is_made_anew,
    is_too_late,
    is_without_homeostasis,
    outside_checkpoints,
    refuse_transforms,
    with_gradient,
)
from torchdeq_ep.host.rules import EquilibriumRule
from torchdeq_ep.host.weights import Schedule, weight_at
from torchdeq_ep.jacobian import Estimator, Metric, gaussian_probes
from torchdeq_ep.jacobian.symmetry import Sample, autocast_of, pack_leniently, probe_symmetry


class Randomness:
    """The generators of one homeostasis, one for each device, so that torch's own stay untouched."""

    def __init__(self, seed: int | Callable[[], int]) -> None:
        self._seed = seed
        self._now: int | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        self._coin = torch.Generator()

    def begin(self) -> None:
        """Before each measurement: start anew if the seed is another."""
        seed = self._seed() if callable(self._seed) else self._seed
        if seed != self._now:
            self._now, self._generators = seed, {}
            self._coin.manual_seed(seed)

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(cast("int", self._now))
        return self._generators[device]

    def happens(self, probability: float) -> bool:
        return float(torch.rand((), generator=self._coin)) < probability


@dataclass(frozen=True, eq=False)
class Options:
    """How a penalty is measured, and where its gradient goes: see `register_homeostasis`."""

    probes: int
    chunk: int | None
    estimator: Estimator
    every: int | float
    metric: Metric | None
    factor: Callable[[], float] | None
    randomness: Randomness


class RandomRegulator:
    """The forward hook of one DEQ. A copy or pickle of it does nothing."""

    def __init__(
        self, name: str, deq: DEQBase, weight: float | Schedule, options: Options, descent: Descent | None
    ) -> None:
        self.name, self.deq, self.last_weight = name, deq, 0.0
        self.last: Sample | None = None
        self.collect: Callable[[Tensor], None]
        self._weight, self._options = weight, options
        self._calls = 0
        self._batched = True
        self.descent = descent

    def register(self) -> list[RemovableHandle]:
        """Descend after each step of the optimiser."""
        return [] if self.descent is None else [self.descent.register()]

    def state_dict(self) -> dict[str, Any]:
        """Where the descent stands; empty without one."""
        return {} if self.descent is None else self.descent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.descent is not None:
            self.descent.load_state_dict(state)

    def __call__(self, deq: DEQBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not deq.training or is_without_homeostasis() or is_made_anew():
            return None
        refuse_transforms()
        step, self._calls = self._calls, self._calls + 1
        options = self._options
        options.randomness.begin()
        if isinstance(options.every, int) and step % options.every:
            return None
        if isinstance(options.every, float) and not options.randomness.happens(options.every):
            return None
        weight = weight_at(self._weight, step, math.inf if self.descent is None else LARGEST_SHARE)
        if weight is None:
            return None
        if options.factor is None and self.descent is None and is_too_late(self.name, weight):
            return None
        f, state = fixed_point(args, kwargs, output)
        states, info = output
        autocast = autocast_of(state)
        packed = pack_leniently(state, autocast)[1]
        vectors = gaussian_probes(packed, options.probes, options.randomness.on(packed.device))
        # A state without a gradient is one of a map that nothing can change.
        trainable = any(t.requires_grad for t in (states[-1] if isinstance(state, Sequence) else states[-1:]))
        create_graph = weight > 0 and torch.is_grad_enabled() and trainable
        with outside_checkpoints():
            sample = probe_symmetry(
                f,
                state,
                vectors,
                options.estimator,
                options.metric,
                autocast,
                self._batched,
                create_graph=create_graph,
                chunk=options.chunk,
            )
        self._batched, self.last, self.last_weight = sample.batched, sample.detached(), weight
        rule = deq.produce_grad[-1]
        if create_graph and isinstance(rule, EquilibriumRule):
            rule.memory.regulated = rule.memory.passes
        if self.descent is not None:
            self.descent.share = weight
            if sample.penalty.requires_grad:
                leaves = self.descent.parameters()
                gradients = torch.autograd.grad(sample.penalty, leaves, retain_graph=True, allow_unused=True)
                self.descent.add(leaves, gradients, float(self.last.penalty))
            return None
        term = weight * sample.penalty
        if options.factor is None:
            self.collect(term)
            return None
        self.collect(term.detach())
        if not term.requires_grad:
            return None
        return [*states[:-1], with_gradient(states[-1], term, options.factor)], info

    def __reduce__(self) -> Any:
        return Nothing, ()
