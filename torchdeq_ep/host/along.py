"""Homeostasis along the error vector: the hook of a switched DEQ, and a weight that finds itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torchdeq.core import DEQBase

from torchdeq_ep.asymmetry import Keep
from torchdeq_ep.errors import EPError, NoDEQError
from torchdeq_ep.host.descent import LARGEST_SHARE, Descent
from torchdeq_ep.host.injection import Nothing, is_made_anew, is_too_late, is_without_homeostasis, with_gradient
from torchdeq_ep.host.rules import EquilibriumRule
from torchdeq_ep.host.weights import Schedule, weight_at
from torchdeq_ep.modes import ImplicitDifferentiation, InfinitesimalEP
from torchdeq_ep.modes.judgement import NEAR_ONE
from torchdeq_ep.modes.steps import StepwiseMode
from torchdeq_ep.state import Equilibrium, cosine, row_dots

AUTO: Final = "auto"
TARGET = 0.95
_FIRST_WEIGHT, _WEIGHTS = 5.0, (1e-3, 500.0)
_FIRST_SHARE, _SHARES = 0.1, (1e-3, 1.0)
_GUARDS = (0.1, 1000.0)
_EVERY = 10
_GAIN, _GUARD_GAIN = 3.0, 0.3
_REFERENCE_TOL, _REFERENCE_STEPS = 3e-2, 50


def has_error_vector(deq: DEQBase) -> bool:
    """Whether the backward pass of a DEQ is one of this package that solves for an error vector."""
    rule = deq.produce_grad[-1]
    return isinstance(rule, EquilibriumRule) and not isinstance(rule.mode, StepwiseMode)


@dataclass
class WeightController:
    """Holds the alignment of error vectors at a target with the least weight.

    A residual is no cosine, so every tenth backward pass the exact error vector is solved for as well, to 3 %; the
    weight then grows or falls by the factor `exp(3 (target - alignment))`. The guard of stability does so in every
    pass, by `exp(0.3 (rate - 0.95))`, with the rate by which `J^T` changes an error vector.

    Args:
        target: The mean over the samples of the cosine between the error vector of equilibrium propagation and the
            exact one.
        weight: The present weight.
        alignment: As last measured; NaN before.
        passes: Backward passes so far.
        guard: The present weight of the guard.
        bounds: The smallest and the largest weight.

    Example:
        >>> controller = WeightController(target=0.95)
        >>> controller.steer(0.5)
        >>> controller.weight > 15
        True
    """

    target: float
    weight: float = _FIRST_WEIGHT
    alignment: float = math.nan
    passes: int = 0
    guard: float = 1.0
    bounds: tuple[float, float] = _WEIGHTS

    @classmethod
    def of_share(cls, target: float) -> WeightController:
        """For a descent of its own: the weight is the share of its step."""
        return cls(target, _FIRST_SHARE, bounds=_SHARES)

    def state_dict(self) -> dict[str, float]:
        """Where it stands: not the bounds, which are those of what it steers."""
        return {name: number for name, number in asdict(self).items() if name != "bounds"}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there, within the bounds."""
        for name, number in self.state_dict().items():
            setattr(self, name, state.get(name, number))
        self.weight = _within(self.bounds, self.weight)

    def stabilise(self, rate: float) -> None:
        """Change the weight of the guard.

        Args:
            rate: `|J^T v| / |v|`, of nine samples in ten at most.
        """
        if math.isfinite(rate):
            self.guard = _within(_GUARDS, self.guard * math.exp(_GUARD_GAIN * min(rate - NEAR_ONE, 1.0)))

    def steer(self, alignment: float) -> None:
        """Change the weight by what was measured.

        Args:
            alignment: The cosine.
        """
        self.alignment = alignment
        if math.isfinite(alignment):
            self.weight = _within(self.bounds, self.weight * math.exp(_GAIN * (self.target - alignment)))

    def see(self, equilibrium: Equilibrium, v: Tensor) -> None:
        """Measure, every tenth time.

        Args:
            equilibrium: The free equilibrium, and what was used for it.
            v: The error vector, packed.
        """
        due, self.passes = self.passes % _EVERY == 0, self.passes + 1
        if not due:
            return
        options = {"tol": _REFERENCE_TOL, "max_iter": _REFERENCE_STEPS, "on_divergence": "accept"}
        other = (ImplicitDifferentiation if equilibrium.used.assumed_symmetry else InfinitesimalEP)(**options)  # type: ignore[arg-type]
        try:
            reference, report = other.solve(equilibrium.afresh(silent=True))
        except EPError:
            return
        if report.is_usable:
            self.steer(_mean_cosine(v, reference, equilibrium))


def _within(bounds: tuple[float, float], weight: float) -> float:
    return min(max(weight, bounds[0]), bounds[1])


def _mean_cosine(v: Tensor, other: Tensor, equilibrium: Equilibrium) -> float:
    rows = equilibrium.independent_rows()
    if rows is None:
        return cosine(v, other)
    one, two = (rows.split(t.float().unsqueeze(0)) for t in (v, other))
    sizes = (row_dots(one, one) * row_dots(two, two)).sqrt()
    cosines = row_dots(one, two)[sizes > 0] / sizes[sizes > 0]
    return float(cosines.mean()) if len(cosines) else math.nan


class ErrorVectorRegulator:
    """The hooks of one DEQ. A copy or pickle of it does nothing."""

    def __init__(
        self,
        name: str,
        deq: DEQBase,
        weight: float | Schedule | WeightController,
        factor: Callable[[], float] | None,
        parameters: frozenset[Tensor] | None = None,
        descent: Descent | None = None,
    ) -> None:
        self.name, self.deq, self.last_weight = name, deq, 0.0
        self.value, self.rate = math.nan, math.nan
        self._parameters = parameters
        self.collect: Callable[[Tensor], None]
        self.controller = weight if isinstance(weight, WeightController) else None
        self._weight, self._factor = weight, factor
        self._calls = 0
        self._asked: ErrorVectorRegulator | None = None
        self.descent = descent

    def register(self) -> list[RemovableHandle]:
        """Ask for the penalty before each forward pass, of whatever rule is then in force; descend after each step."""
        handles: list[RemovableHandle] = [self.deq.register_forward_pre_hook(_Asking(self))]
        return handles if self.descent is None else [*handles, self.descent.register()]

    def ask(self, deq: DEQBase, _: Any) -> None:
        """Before a forward pass: the rule in force is to make the penalty."""
        rule = deq.produce_grad[-1]
        if not deq.training or is_without_homeostasis():
            return
        if not isinstance(rule, EquilibriumRule):
            raise NoDEQError(
                f"homeostasis along the error vector needs the error vector, and {self.name or 'the DEQ'} has the "
                "backward of torchdeq: call tep.use_backward(model, 'ep') first (or 'ift', 'aep'), or take random "
                "directions, estimator='antisymmetric'."
            )
        if is_made_anew():  # as it was
            rule.slot.penalised = self._asked
            return
        weight = self._weight_at(self._calls)
        self._calls += 1
        self._asked = None if weight is None else self
        if weight is not None:
            self.last_weight, rule.slot.penalised = weight, self

    def __call__(self, deq: DEQBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        rule = deq.produce_grad[-1]
        slot = rule.slot if isinstance(rule, EquilibriumRule) else None
        if slot is None:
            return None
        zero, slot.zero, slot.penalised = slot.zero, None, None
        if not deq.training or zero is None or is_made_anew():
            return None
        if self.descent is not None:
            self.descent.share = self.last_weight
            return None
        term = self.last_weight * zero
        if self._factor is None:
            if not is_too_late(self.name, self.last_weight):
                self.collect(term)
            return None
        states, info = output
        return [*states[:-1], with_gradient(states[-1], term, self._factor)], info

    def state_dict(self) -> dict[str, Any]:
        """Where an automatic weight and a descent stand; empty without either."""
        found: dict[str, Any] = {} if self.controller is None else self.controller.state_dict()
        return found if self.descent is None else found | self.descent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.controller is not None:
            self.controller.load_state_dict(state)
        if self.descent is not None:
            self.descent.load_state_dict(state)

    def acts_on(self, leaf: Tensor) -> bool:
        """Whether the penalty is to reach a parameter."""
        return self._parameters is None or leaf in self._parameters

    @property
    def guard(self) -> float:
        """Weight of the guard of stability, relative to that of the asymmetry."""
        return 0.0 if self.controller is None else self.controller.guard

    @property
    def keep(self) -> Keep | None:
        """Where gradients of the penalty are kept for a descent of its own."""
        return None if self.descent is None or self.last_weight == 0.0 else self.descent.add

    def on_value(self, value: float, rate: float) -> None:
        """Told what the penalty was, and the rate of most error vectors."""
        self.value, self.rate = value, rate
        if self.controller is not None:
            self.controller.stabilise(rate)

    def on_error_vector(self, equilibrium: Equilibrium, v: Tensor) -> None:
        """Shown each error vector."""
        if self.controller is not None:
            self.controller.see(equilibrium, v)

    def _weight_at(self, step: int) -> float | None:
        if isinstance(self._weight, WeightController):
            return self._weight.weight
        return weight_at(self._weight, step, math.inf if self.descent is None else LARGEST_SHARE)

    def __reduce__(self) -> Any:
        return Nothing, ()


@dataclass(frozen=True, eq=False)
class _Asking:
    """The hook before a forward pass. Not a bound method: a copy of one is bound to what is left of its regulator."""

    regulator: ErrorVectorRegulator

    def __call__(self, deq: DEQBase, inputs: Any) -> None:
        self.regulator.ask(deq, inputs)

    def __reduce__(self) -> Any:
        return Nothing, ()
