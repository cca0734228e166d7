"""Jacobian homeostasis on the DEQs of a model: forward hooks that penalise the asymmetry of `J M` at the fixed point.

The penalty itself and its estimators are those of `jacobian.symmetry`. Here it is decided when it is measured and how
much it weighs, and it is handed to the training loop: to be added to the loss, or injected into the backward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchdeq.core import DEQBase

from torchdeq_ep._options import check_choice, check_count, check_metric
from torchdeq_ep.errors import EPWarning, InvalidOptionError
from torchdeq_ep.host.along import AUTO, TARGET, ErrorVectorRegulator, WeightController, has_error_vector
from torchdeq_ep.host.deqs import deqs_of
from torchdeq_ep.host.descent import LARGEST_SHARE, Descent
from torchdeq_ep.host.hooks import FixedPointHandle
from torchdeq_ep.host.probing import Options, Randomness, RandomRegulator
from torchdeq_ep.host.weights import Inject, Schedule, Weight, factor_of, weight_at, weights_by_name
from torchdeq_ep.jacobian import Estimator, Metric, SymmetryMeasurement
from torchdeq_ep.jacobian.symmetry import ESTIMATORS, Moments, check_chunk

Direction = Estimator | Literal["error-vector"]

_MANY_UNCOLLECTED = 100
_RANDOM_WEIGHT, _RANDOM_SHARE = 0.1, 1.0


@dataclass(frozen=True, repr=False)
class HomeostasisReport(SymmetryMeasurement):
    """The last measurements of a homeostasis: over all DEQs together, and of each.

    The inherited numbers are those of all Jacobians side by side: `penalty` is the sum of the DEQs' penalties.

    Args:
        weighted: The sum of the penalties times their weights, which is what the loss is made larger by if it is added
            to it. Along the error vector, half of it.
        deqs: The measurement of each DEQ, by its name in `module.named_modules()`; `""` if the module is the DEQ.
        weights: The weight of each.
        alignment: With `weight="auto"`, the cosine of the error vectors of equilibrium propagation to the exact ones
            when it was last measured, for each DEQ; NaN before.

    Example:
        >>> of_deq = SymmetryMeasurement(0.02, 0.001, 0.75, 0.01, 0.3, 0.01)
        >>> report = HomeostasisReport(**vars(of_deq), weighted=0.002, deqs={"deq": of_deq})
        >>> report.symmetry, list(report.deqs)
        (0.75, ['deq'])
    """

    weighted: float
    deqs: dict[str, SymmetryMeasurement]
    weights: dict[str, float] = field(default_factory=dict)
    alignment: dict[str, float] = field(default_factory=dict)


class HomeostasisHandle:
    """What [`register_homeostasis`][torchdeq_ep.host.register_homeostasis] returns.

    Args:
        regulators: What measures and weights the penalty of each DEQ; `register_homeostasis` makes them.

    Example:
        >>> import torch, torchdeq, torchdeq_ep
        >>> linear, deq = torch.nn.Linear(3, 3), torchdeq.get_deq(ift=True)
        >>> with torchdeq_ep.register_homeostasis(deq, weight=0.1) as homeostasis:
        ...     (z,), info = deq(lambda z: 0.5 * torch.tanh(linear(z)), torch.zeros(2, 3))
        ...     (z.sum() + homeostasis.penalty()).backward()
        >>> 0 < homeostasis.last.symmetry < 1
        True
    """

    def __init__(self, regulators: Sequence[RandomRegulator | ErrorVectorRegulator]) -> None:
        self._regulators = regulators
        self._total: Tensor | None = None
        self._uncollected = 0
        for regulator in regulators:
            regulator.collect = self._collect
        self._handle = FixedPointHandle([regulator.deq for regulator in regulators], regulators)
        self._asking = [h for r in regulators for h in r.register()]

    def __repr__(self) -> str:
        told = f"penalty {self.last.penalty:.3g}" if self.last else "nothing measured yet"
        return f"<{type(self).__name__} on {len(self.deqs)} DEQ{'' if len(self.deqs) == 1 else 's'}: {told}>"

    @property
    def deqs(self) -> tuple[DEQBase, ...]:
        """The DEQs that are regularised, in the order of `module.modules()`."""
        return self._handle.deqs

    @property
    def last(self) -> HomeostasisReport | None:
        """The latest measurements of each DEQ; `None` before the first. Reading it does not consume the penalty."""
        if any(isinstance(r, ErrorVectorRegulator) for r in self._regulators):
            return _along_error_vectors(cast("Sequence[ErrorVectorRegulator]", self._regulators))
        random = cast("Sequence[RandomRegulator]", self._regulators)
        samples = {r.name: (r.last_weight, r.last) for r in random if r.last is not None}
        if not samples:
            return None
        each = {name: Moments.of(sample) for name, (_, sample) in samples.items()}
        together = Moments.sum(list(each.values()))
        return HomeostasisReport(
            **vars(together.measurement()),
            weighted=sum(weight * each[name].penalty for name, (weight, _) in samples.items()),
            deqs={name: moments.measurement() for name, moments in each.items()},
            weights={name: weight for name, (weight, _) in samples.items()},
        )

    def penalty(self) -> Tensor:
        """The weighted penalties of every forward pass since the last call of this method, to be added to the loss.

        Returns:
            A scalar with a graph; zero if there was none (no forward pass in training mode, or none measured in this
            period), and with `descent`. Without a graph if it is injected, or if autograd was off.
        """
        total, self._total, self._uncollected = self._total, None, 0
        return torch.zeros(()) if total is None else total

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Where automatic weights and descents stand, for a run that is to be resumed.

        Returns:
            Plain numbers, by the name of the DEQ; empty without either.
        """
        states = {regulator.name: regulator.state_dict() for regulator in self._regulators}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from there.

        Args:
            state: As `state_dict` returned it.

        Raises:
            InvalidOptionError: If it is of other DEQs.
        """
        own = self.state_dict()
        if set(own) != set(state):
            raise InvalidOptionError(f"the state is one of {sorted(state)}, and these are {sorted(own)}.")
        for regulator in self._regulators:
            regulator.load_state_dict(state.get(regulator.name, {}))

    def remove(self) -> None:
        """Stop measuring; a second call does nothing."""
        self._handle.remove()
        for handle in self._asking:
            handle.remove()

    def __enter__(self) -> HomeostasisHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _collect(self, term: Tensor) -> None:
        self._total = term if self._total is None else self._total + term.to(self._total.device)
        if term.requires_grad:
            self._uncollected += 1
            if self._uncollected == _MANY_UNCOLLECTED:
                warnings.warn(
                    f"{_MANY_UNCOLLECTED} forward passes have left a penalty that nobody has asked for, and their "
                    "graphs stay in memory. Add handle.penalty() to the loss, or register_homeostasis(..., "
                    "inject=True), or weight=0.0 to measure only.",
                    EPWarning,
                    stacklevel=2,
                )


def _along_error_vectors(regulators: Sequence[ErrorVectorRegulator]) -> HomeostasisReport | None:
    seen = [regulator for regulator in regulators if math.isfinite(regulator.value)]
    if not seen:
        return None
    nan = math.nan
    return HomeostasisReport(
        sum(r.value for r in seen),
        *(nan,) * 5,
        weighted=sum(r.last_weight / 2 * r.value for r in seen),
        deqs={r.name: SymmetryMeasurement(r.value, nan, nan, nan, nan, nan) for r in seen},
        weights={r.name: r.last_weight for r in seen},
        alignment={r.name: r.controller.alignment for r in seen if r.controller is not None},
    )


def register_homeostasis(
    module: nn.Module,
    weight: Weight | None = None,
    probes: int = 5,
    estimator: Direction | None = None,
    every: int | float = 1,
    *,
    metric: Metric | None = None,
    inject: Inject = False,
    seed: int | Callable[[], int] = 0,
    target: float = TARGET,
    parameters: Iterable[nn.Parameter] | None = None,
    descent: torch.optim.Optimizer | None = None,
    chunk: int | None = None,
) -> HomeostasisHandle:
    """Keep the Jacobian of every DEQ close to symmetric, by a penalty at the solver's fixed point.

    `(loss + homeostasis.penalty()).backward()` is all that a training loop needs. Where all DEQs have an error vector,
    that is where they have been switched, it acts along that, with a weight that finds itself; otherwise in random
    directions, which do not depend on the backward pass. In evaluation mode nothing is measured. The forward result,
    buffers and torch's random state stay as they are. A copy or a pickle of the module is without homeostasis.

    Args:
        module: A model that contains torchdeq DEQs, or such a DEQ.
        weight: Factor of the penalty: a number; a function of the number of earlier forward passes of the DEQ, which
            may return `None` to leave one out; or a dict of these by DEQ name, as in `module.named_modules()`, which
            leaves out the DEQs it does not name. With 0 the Jacobian is measured, but no graph is built. `"auto"`,
            along the error vector, holds the alignment of error vectors at `target` with the least weight. By default
            that, or 0.1 in random directions.
        probes: Number of Gaussian probes at each forward pass.
        estimator: `"antisymmetric"`, or `"paper"`; see [`symmetry_penalty`][torchdeq_ep.jacobian.symmetry_penalty].
            By default `"error-vector"` if the weight finds itself, and `"antisymmetric"` if it is given.
            `"error-vector"` takes no probes: the direction is the error vector of each sample, the only one in which
            the asymmetry meets the gradient. The penalty is then measured in the backward pass, of a
            DEQ that was switched by [`use_backward`][torchdeq_ep.use_backward], and `probes`, `chunk`, `every`,
            `metric` and `seed` have no part: the metric is that of the mode.
        every: A whole number `k`: measure at every `k`-th forward pass of a DEQ. A number between 0 and 1: measure with
            that probability. The penalty is not scaled up in return.
        metric: Positive diagonal `M` as a function of the state, `"auto"` to fit one, or `None` for the identity.
        inject: Whether the gradient of the penalty reaches the parameters by itself, in each backward pass that comes
            through the last state that the DEQ returned. The gradient is then multiplied by this: `True` is 1. The
            factor that multiplies your loss cannot be seen from here: give a `torch.amp.GradScaler` if one scales the
            loss, and a number or a function `() -> factor` if you divide the loss, e.g. by the number of accumulation
            steps; it is asked in the backward pass. `penalty()` is then without a graph.
        seed: Seed of the probes, and of the draws of a probability; or a function that gives it at each forward pass,
            which starts anew where it is another one.
        target: Of `weight="auto"`: the mean over the samples of the cosine between the error vector of equilibrium
            propagation and the exact one, between 0 and 1.
        descent: The optimiser that trains the model. After each of its steps the parameters that it has take a step of
            gradient descent on the penalty, apart from the running scale by which Adam divides gradients, and there is
            nothing to add to the loss. The weight is then a share, at most 1: of the step that would take the penalty
            to its minimum, times the share of its highest rate at which the optimiser goes. By default `"auto"` finds
            it along the error vector, and it is 1 in random directions. See
            [beside the optimiser](homeostasis.md#beside-the-optimiser).
        parameters: Along the error vector: those that the penalty reaches, for instance the weights on the way back;
            by default all that the map depends on.
        chunk: How many probes have a graph in memory at a time; by default all. See
            [`symmetry_penalty`][torchdeq_ep.jacobian.symmetry_penalty].

    Returns:
        A handle with `penalty()`, `last` and `remove()`, which is also a context manager.

    Raises:
        NoDEQError: If there is no DEQ in the module.
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch, torchdeq, torchdeq_ep
        >>> from torchdeq_ep.host.homeostasis import register_homeostasis
        >>> linear, deq = torch.nn.Linear(3, 3), torchdeq.get_deq(ift=True)
        >>> homeostasis = register_homeostasis(deq, weight=lambda step: min(1.0, 0.01 * step), every=2)
        >>> (z,), info = deq(lambda z: 0.5 * torch.tanh(linear(z)), torch.zeros(2, 3))
        >>> loss = z.sum() + homeostasis.penalty()
    """
    if estimator is not None:
        check_choice("estimator", estimator, (*ESTIMATORS, "error-vector"))
    if isinstance(every, bool) or not (
        (isinstance(every, int) and every >= 1) or (isinstance(every, float) and 0 < every < 1)
    ):
        raise InvalidOptionError(
            f"every must be a whole number of at least 1, or a probability between 0 and 1, not {every!r}."
        )
    check_count("probes", probes)
    check_chunk(chunk)
    check_metric(metric)
    deqs = deqs_of(module)
    if weight is None:
        along = estimator == "error-vector" or (estimator is None and all(map(has_error_vector, deqs)))
        weight = AUTO if along else _RANDOM_WEIGHT if descent is None else _RANDOM_SHARE
    if estimator is None:
        estimator = "error-vector" if weight == AUTO else "antisymmetric"
    if descent is not None:
        _check_descent(descent, weight, inject)
    named = {name: part for name, part in module.named_modules() if part in deqs}
    if estimator == "error-vector":
        chosen = None if parameters is None else frozenset(parameters)
        return HomeostasisHandle(_along(weight, named, inject, target, chosen, descent))
    if parameters is not None:
        raise InvalidOptionError("parameters= goes with estimator='error-vector': random probes reach all of them.")
    if weight == AUTO:
        raise InvalidOptionError("weight='auto' goes with estimator='error-vector': random probes have no alignment.")
    options = Options(
        probes=probes,
        chunk=chunk,
        estimator=estimator,
        every=every,
        metric=metric,
        factor=factor_of(inject),
        randomness=Randomness(seed),
    )
    return HomeostasisHandle(
        [
            RandomRegulator(name, deq, value, options, _descent(descent))
            for name, (deq, value) in weights_by_name(weight, named).items()
        ]
    )


def _along(
    weight: Weight,
    deqs: dict[str, DEQBase],
    inject: Inject,
    target: float,
    parameters: frozenset[Tensor] | None,
    descent: torch.optim.Optimizer | None,
) -> list[ErrorVectorRegulator]:
    weights: dict[str, float | Schedule | WeightController]
    if weight == AUTO:
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < 1:
            raise InvalidOptionError(f"target must be a cosine between 0 and 1, not {target!r}.")
        controller = WeightController if descent is None else WeightController.of_share
        weights = {name: controller(target) for name in deqs}
    else:
        weights = {name: value for name, (_, value) in weights_by_name(weight, deqs).items()}
    factor = factor_of(inject)
    return [
        ErrorVectorRegulator(name, deqs[name], value, factor, parameters, _descent(descent))
        for name, value in weights.items()
    ]


def _descent(optimizer: torch.optim.Optimizer | None) -> Descent | None:
    return None if optimizer is None else Descent(optimizer)


def _check_descent(descent: object, weight: Weight, inject: Inject) -> None:
    if not isinstance(descent, torch.optim.Optimizer):
        raise InvalidOptionError(f"descent must be the optimiser that trains the model, not {type(descent).__name__}.")
    if inject is not False:
        raise InvalidOptionError("inject= adds the penalty to the gradient of the loss, and descent= keeps it apart.")
    for value in weight.values() if isinstance(weight, Mapping) else [weight]:
        if value != AUTO and not callable(value):
            weight_at(value, 0, LARGEST_SHARE)
