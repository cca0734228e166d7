"""Lightning callbacks for any LightningModule that contains torchdeq DEQs; after training it is as it was found."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchdeq_ep import (
    EquilibriumPropagation,
    ImplicitDifferentiation,
    NudgeReport,
    Stencil,
    get_backward,
    register_homeostasis,
    use_backward,
)
from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.extend import (
    BackwardHandle,
    Capture,
    Equilibrium,
    EquilibriumRule,
    Estimator,
    Mode,
    ModeLike,
    Reference,
    deqs_of,
    fixed_point,
    left_as_found,
    norm,
)
from torchdeq_ep.jacobian import symmetry_score
from torchdeq_ep.jacobian.metric import diagonal_metric

Unit = Literal["epoch", "step"]
Amplitude = Literal["relative", "absolute", "per-sample"]


def loss_scale(trainer: Trainer) -> float:
    """The factor between the loss that `training_step` returns and the one that is differentiated.

    Lightning divides by the number of accumulated batches, and multiplies by the scale of a GradScaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches


def named(module: nn.Module, path: str | None) -> Any:
    """The attribute of a module at a dotted path, `None` for no path.

    Args:
        module: Where the path starts.
        path: For instance `"network.metric"`.

    Returns:
        The attribute.

    Raises:
        InvalidOptionError: If there is none.
    """
    found: Any = module
    for part in path.split(".") if path else ():
        if not hasattr(found, part):
            raise InvalidOptionError(f"{type(module).__name__} has no attribute {path!r}: there is no {part!r} in it.")
        found = getattr(found, part)
    return found if path else None


def current(schedule: Mapping[int, Any], now: int) -> Any:
    """The entry of a schedule with the largest key that is not beyond `now`.

    Args:
        schedule: Values by the epoch or step from which they hold; one of them 0.
        now: Epoch or step.

    Returns:
        The value.

    Example:
        >>> current({0: "ift", 2: "hep"}, 1), current({0: "ift", 2: "hep"}, 2)
        ('ift', 'hep')
    """
    return schedule[max(start for start in schedule if start <= now)]


def _schedule(name: str, value: Any) -> dict[int, Any]:
    schedule = dict(value) if isinstance(value, Mapping) else {0: value}
    if 0 not in schedule or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in schedule):
        raise InvalidOptionError(
            f"{name} as a schedule needs whole numbers of at least 0 as keys, 0 among them, not {list(schedule)}: "
            "each value holds from that epoch or step on."
        )
    return schedule


@dataclass(frozen=True)
class PerSample(Mode):
    """A mode of equilibrium propagation whose amplitude multiplies the gradient of each sample's own loss.

    The papers nudge every sample by `beta dL_sample/dphi`. Where the loss is a mean over the batch, this is the
    absolute amplitude `beta` times the number of samples.

    Args:
        mode: The mode, with a number for `beta`.
        scale: Returns the factor that multiplies the loss, by which the amplitude is divided.
    """

    mode: EquilibriumPropagation
    scale: Callable[[], float]

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        stencil = cast(Stencil, self.mode.stencil)
        beta = float(stencil.beta) * equilibrium.z.shape[0] / self.scale()
        return replace(self.mode, stencil=stencil.at(beta), scale="absolute").solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return self.solve(equilibrium)


class Means:
    """Means of what is measured in each step: over `log_every_n_steps` of the trainer, and over the epoch.

    Lightning's own `log`, called for each value in each step, is slow beside a step of a small network.

    Example:
        >>> means = Means()
        >>> means.add({"loss": 1.0}), means.add({"loss": 2.0})
        (None, None)
        >>> means.epoch
        {'loss': 1.5}
    """

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {}
        self._epoch: dict[str, list[float]] = {}

    @property
    def recent(self) -> dict[str, float]:
        """Means since the last that were logged."""
        return {name: sum(values) / len(values) for name, values in self._recent.items()}

    @property
    def epoch(self) -> dict[str, float]:
        """Means over the epoch so far."""
        return {name: sum(values) / len(values) for name, values in self._epoch.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Take the measurements of one step, or of a part of it.

        Args:
            values: By name; not every step must have every name.
        """
        for name, value in values.items():
            self._recent.setdefault(name, []).append(value)
            self._epoch.setdefault(name, []).append(value)

    def end_batch(self, trainer: Trainer, batch_idx: int) -> dict[str, float]:
        """At the end of every n-th batch, give the loggers the means of the last n, under `NAME_step`.

        Args:
            trainer: The trainer.
            batch_idx: Number of the batch in the epoch.

        Returns:
            What was logged.
        """
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (batch_idx + 1) % every:
            return {}
        logged = {f"{name}_step": mean for name, mean in self.recent.items()}
        for logger in trainer.loggers if logged else []:
            logger.log_metrics(logged, step=trainer.global_step)
        self._recent = {}
        return logged

    def end_epoch(self, pl_module: LightningModule, prog_bar: bool = False) -> None:
        """Log the means of the epoch, and start anew.

        Args:
            pl_module: Whose `log` is called.
            prog_bar: Whether they are shown.
        """
        for name, value in self.epoch.items():
            pl_module.log(name, value, prog_bar=prog_bar, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self._recent, self._epoch = {}, {}

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """What has been measured so far, for a checkpoint in the middle of an epoch."""
        return {"recent": self._recent, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, dict[str, list[float]]]) -> None:
        """Go on from there.

        Args:
            state: What `state_dict` returned.
        """
        self._recent, self._epoch = state["recent"], state["epoch"]


class _Attached(Callback):
    """A callback that attaches something to the module, and takes it off when training ends, in whatever way."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        raise NotImplementedError


class _Measuring(Callback):
    """A callback that logs means, which a run that is resumed in the middle of an epoch goes on with."""

    def __init__(self) -> None:
        self._means = Means()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("means_of_callbacks", {})[self._place(trainer)] = self._means.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("means_of_callbacks", {}).get(self._place(trainer))
        if state is not None:
            self._means.load_state_dict(state)

    def _place(self, trainer: Trainer) -> int:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return callbacks.index(self)


class SwapBackward(_Attached):
    """Train with another backward pass, or with one after the other.

    Args:
        backward: Spec of a mode, a mode, or a dict of these by the epoch or step from which they hold: `{0: "ift",
            2: "hep"}` warms up with exact gradients.
        by: Whether the keys of a dict count epochs or optimiser steps.
        metric: Dotted path of a metric in the LightningModule, such as `"network.metric"`, for the modes that take one.
        amplitude: `"relative"` and `"absolute"` as in
            [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation]. `"per-sample"`: `beta` is the factor of the
            gradient of each sample's loss, as in the papers; for a loss that is a mean over the batch, and a state
            with one row for each sample.
        beta: Amplitude of the modes whose spec does not give one; by default chosen by the mode.
        max_iter: Largest number of steps of a nudged or adjoint phase, where the spec does not give it.
        tol: Residual at which such a phase stops, likewise.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        UnknownBackwardError: If no backward mode has that name.

    Example:
        >>> SwapBackward({0: "ift", 5: "hep:n_points=4"}).at(epoch=7, step=0)
        'hep:n_points=4'
    """

    def __init__(
        self,
        backward: str | dict[int, str] = "ep",
        by: Unit = "epoch",
        metric: str | None = None,
        amplitude: Amplitude = "relative",
        beta: float | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
    ) -> None:
        if by not in ("epoch", "step"):
            raise InvalidOptionError(f"by must be 'epoch' or 'step', not {by!r}.")
        if amplitude not in ("relative", "absolute", "per-sample"):
            raise InvalidOptionError(f"amplitude must be 'relative', 'absolute' or 'per-sample', not {amplitude!r}.")
        self.schedule = _schedule("backward", backward)
        self.by, self.metric, self.amplitude, self.beta = by, metric, amplitude, beta
        self.options = {"max_iter": max_iter, "tol": tol}
        for spec in self.schedule.values():
            self._mode(spec, None, lambda: 1.0)
        self._handle: BackwardHandle | None = None
        self._in_force: Any = None

    def at(self, epoch: int, step: int) -> str | ModeLike:
        """What the schedule names at an epoch and step."""
        return cast("str | ModeLike", current(self.schedule, epoch if self.by == "epoch" else step))

    def mode(self, spec: str | ModeLike, trainer: Trainer, pl_module: LightningModule) -> ModeLike:
        """The mode that a spec stands for in this module, with the options of this callback."""
        return self._mode(spec, named(pl_module, self.metric), partial(loss_scale, trainer))

    def _mode(self, spec: str | ModeLike, metric: Any, scale: Callable[[], float]) -> ModeLike:
        mode = get_backward(spec)
        if not is_dataclass(mode):
            return mode
        open_to_us = {field.name for field in fields(mode) if getattr(mode, field.name) is None}
        given = self.options | {"metric": metric}
        options = {name: value for name, value in given.items() if value is not None and name in open_to_us}
        mode = replace(cast(Any, mode), **options)
        if not isinstance(mode, EquilibriumPropagation):
            return cast(ModeLike, mode)
        stencil = cast(Stencil, mode.stencil)
        if stencil.beta == "auto" and self.beta is not None:
            mode = replace(mode, stencil=stencil.at(self.beta))
        if self.amplitude == "relative":
            return mode
        if stencil.beta == "auto" and self.beta is None:
            raise InvalidOptionError(
                f"with amplitude={self.amplitude!r} the amplitude must be a number, and {spec!r} does not give one: "
                "set beta, or write for instance ep:beta=0.05."
            )
        mode = replace(mode, scale="absolute")
        return PerSample(mode, scale) if self.amplitude == "per-sample" else mode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        spec = self.at(trainer.current_epoch, trainer.global_step)
        if self._handle is None or spec != self._in_force:
            self._remove()
            self._handle = use_backward(pl_module, self.mode(spec, trainer, pl_module))
            self._in_force = spec

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


class Homeostasis(_Measuring, _Attached):
    """Jacobian homeostasis during training, without a change to `training_step`.

    The gradient of the penalty is added in the backward pass, or followed by a step of its own (`descent`). The probes
    depend on the seed, the step and the process alone, so a run that is resumed draws the same ones.

    Args:
        weight: Factor of the gradient of the penalty, or a dict of factors by the epoch or step from which they hold.
            With 0 the symmetry is measured and logged, and nothing changes.
        descent: `False`: the weighted penalty is added to the loss, as in the papers, and the optimiser mixes the two
            gradients. `True`: beside each step of the optimisers the parameters take a step of plain gradient descent
            on the penalty. `weight` is then its learning rate for each entry of the state of one sample, by whose
            number the penalty is divided, times what the schedule of the first optimiser has left of its own. The
            state then has one row for each sample.
        by: Whether the keys of a dict count epochs or steps.
        every: Penalise at every so many batches.
        probes: Gaussian probes each time.
        estimator: `"antisymmetric"` or `"paper"`, see [`register_homeostasis`][torchdeq_ep.register_homeostasis].
        metric: Dotted path of a metric in the LightningModule.
        seed: Seed of the probes.
        enabled: `False` makes this callback do nothing.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> Homeostasis({0: 0.0, 2: 10.0}).weight_at(epoch=3, step=0)
        10.0
    """

    def __init__(
        self,
        weight: float | dict[int, float] = 0.1,
        descent: bool = False,
        by: Unit = "epoch",
        every: int = 1,
        probes: int = 5,
        estimator: Estimator = "antisymmetric",
        metric: str | None = None,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        if by not in ("epoch", "step"):
            raise InvalidOptionError(f"by must be 'epoch' or 'step', not {by!r}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidOptionError(f"every must be a whole number of at least 1, not {every!r}.")
        if probes < 1:
            raise InvalidOptionError(f"probes must be a whole number of at least 1, not {probes!r}.")
        self.schedule = _schedule("weight", weight)
        for value in self.schedule.values():
            if not 0 <= value < math.inf:
                raise InvalidOptionError(f"weight must be a number of at least 0, not {value!r}.")
        self.by, self.every, self.seed, self.enabled = by, every, seed, enabled
        self.metric, self.descent = metric, descent
        self.options: dict[str, Any] = {"probes": probes, "estimator": estimator}
        self._registered: Any = None
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def weight_at(self, epoch: int, step: int) -> float:
        """The weight at an epoch and step."""
        return float(current(self.schedule, epoch if self.by == "epoch" else step))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._remove()
        if not self.enabled or batch_idx % self.every:
            return
        # One registration for each batch: its probes then follow from the step, without a state to be saved.
        key = repr((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
        weight = self.weight_at(trainer.current_epoch, trainer.global_step)
        self._registered = register_homeostasis(
            pl_module,
            self._rates(pl_module, weight) if self.descent else weight,
            metric=named(pl_module, self.metric),
            inject=False if self.descent else partial(loss_scale, trainer),
            seed=int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"),
            **self.options,
        )

    def _rates(self, pl_module: LightningModule, weight: float) -> dict[str, Callable[[int], float]]:
        """For each DEQ the weight times the entries of its state, which is known when the penalty is asked for."""
        entries: dict[str, int] = {}

        def count(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = fixed_point(args, kwargs, output)[1]
            entries[name] = sum(part[0].numel() for part in ([state] if isinstance(state, Tensor) else state))

        deqs = deqs_of(pl_module)
        names = {name: module for name, module in pl_module.named_modules() if module in deqs}
        for name, deq in names.items():
            self._handles.append(deq.register_forward_hook(partial(count, name), with_kwargs=True))

        def rate(name: str, _: int) -> float:
            return weight * entries[name]

        return {name: partial(rate, name) for name in names}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        penalty = self._registered.penalty() if self._registered is not None and self.descent else None
        if penalty is None or not penalty.requires_grad:
            return
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        # The backward pass of the loss may need what the two have in common.
        gradients = torch.autograd.grad(penalty, trained, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                share = gradient / trainer.accumulate_grad_batches
                self._gradients[parameter] = self._gradients.get(parameter, 0) + share

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        groups = trainer.optimizers[0].param_groups
        left = groups[0]["lr"] / groups[0].get("initial_lr", groups[0]["lr"])
        with torch.no_grad():
            for parameter, gradient in self._gradients.items():
                parameter.sub_(trainer.strategy.reduce(gradient, reduce_op="mean"), alpha=left)
        self._gradients = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = None if self._registered is None else self._registered.last
        self._remove()
        if last is not None:
            values = {"penalty": last.penalty, "weighted": last.weighted, "symmetry": last.symmetry}
            self._means.add({f"homeostasis/{name}": value for name, value in values.items()})
        self._means.end_batch(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _remove(self) -> None:
        for handle in [*self._handles, *([] if self._registered is None else [self._registered])]:
            handle.remove()
        self._handles, self._registered = [], None


class NudgeStats(_Measuring, _Attached):
    """Log what the solves of a training step did: steps, calls, amplitude, residual, and how many went wrong.

    Under `nudge/`: `iterations`, `calls`, `beta` (relative), `residual`, the shares of solves that missed their
    tolerance (`unconverged`), diverged and had to halve the amplitude (`shrunk`), or fell back to implicit
    differentiation (`fallback`), and for contours the estimated `truncation`. A plain torchdeq backward has
    `iterations` and `residual` alone. Under `free/`: `iterations` and relative `residual` of the free phase. All are
    means over the solves of an epoch, and residuals and iterations of torchdeq's solvers the largest over the rows.

    Example:
        >>> trainer_options = {"callbacks": [SwapBackward("hep"), NudgeStats()]}
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._remove()
        for deq in deqs_of(pl_module):
            self._handles.append(deq.register_forward_pre_hook(self._listen, with_kwargs=True))
            self._handles.append(deq.register_forward_hook(self._watch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._remove()
        self._means.end_batch(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _listen(self, deq: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        before = kwargs.get("backward_writer")

        def writer(statistics: Any) -> None:
            self._means.add(_statistics(deq, statistics))
            if before is not None:
                before(statistics)

        return args, kwargs | {"backward_writer": writer}

    def _watch(self, deq: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if deq.training:
            iterations, residual = _solver_numbers(output[1])
            self._means.add({"free/iterations": iterations, "free/residual": residual})

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _statistics(deq: nn.Module, statistics: Any) -> dict[str, float]:
    report = statistics.get("report")
    if report is None:
        iterations, residual = _solver_numbers(statistics)
        return {"nudge/iterations": iterations, "nudge/residual": residual}
    values = {
        "iterations": float(report.iterations),
        "calls": float(report.calls),
        "residual": report.residual,
        "unconverged": float(not report.converged),
    }
    rule = _rule(deq)
    if rule is not None and isinstance(rule.mode, (EquilibriumPropagation, PerSample)):
        values |= {
            "beta": report.beta,
            "shrunk": float(report.retries > 0),
            "fallback": float(report.backward.startswith(ImplicitDifferentiation.__name__)),
        }
    if math.isfinite(report.truncation):
        values["truncation"] = report.truncation
    return {f"nudge/{name}": value for name, value in values.items()}


def _solver_numbers(statistics: Any) -> tuple[float, float]:
    return float(statistics["nstep"].max()), float(statistics["rel_lowest"].max())


def _rule(deq: nn.Module) -> EquilibriumRule | None:
    rule = cast(Any, deq).produce_grad[-1]
    return rule if isinstance(rule, EquilibriumRule) else None


class AlignmentMonitor(_Measuring):
    """Compare error vectors of equilibrium propagation with exact ones, every so many steps, on a few samples.

    After the step, `training_step` is called once more on the first rows of the batch; what it logs is dropped, and
    buffers, gradients and the random state are as before. Logged under `alignment/`, with the DEQ's name in front of
    the measure if there are several: `cosine` of the two error vectors, `symmetry` of `J M` (1 is symmetric),
    `residual` of the free phase; and the cosine of each part of the state that `parts` names.

    Args:
        every: Steps between two measurements; 0 for none.
        samples: Rows of the batch.
        backward: Spec of the mode to compare; by default the one that each DEQ is trained with, or `ep` if that is
            exact.
        metric: Dotted path of a metric in the LightningModule, for the symmetry, and for a mode that is given by
            `backward` or by default. Without it the symmetry is that with the metric of the mode.
        parts: Dotted path of a method of the LightningModule without arguments that returns slices of the state's
            second dimension by name.
        probes: Gaussian probes of the symmetry.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> monitor = AlignmentMonitor(every=100, samples=4)
    """

    def __init__(
        self,
        every: int = 100,
        samples: int = 8,
        backward: str | None = None,
        metric: str | None = None,
        parts: str | None = None,
        probes: int = 20,
    ) -> None:
        if every < 0 or samples < 1 or probes < 1:
            raise InvalidOptionError(
                f"every must be at least 0, samples and probes at least 1, not {every}, {samples} and {probes}."
            )
        if backward is not None:
            get_backward(backward)
        super().__init__()
        self.every, self.samples, self.backward, self.probes = every, samples, backward, probes
        self.metric, self.parts = metric, parts
        self.last: dict[str, float] = {}
        """The latest measurements."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)
        named(pl_module, self.parts)
        if self.every and not pl_module.automatic_optimization:
            raise InvalidOptionError(
                f"AlignmentMonitor calls training_step, and that of {type(pl_module).__name__} steps its optimisers by "
                "itself (automatic_optimization=False): set every=0."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every or batch_idx % self.every:
            return
        with trainer.precision_plugin.train_step_context():
            self.last = self._measure(pl_module, batch, batch_idx)
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=trainer.global_step)
        self._means.add(self.last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _measure(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> dict[str, float]:
        deqs = deqs_of(pl_module)
        metric = named(pl_module, self.metric)
        references = [Reference() for _ in deqs]
        modes = [self._mode(deq, metric) for deq in deqs]
        few = _first_rows(batch, self.samples)
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        handles = [use_backward(deq, reference) for deq, reference in zip(deqs, references, strict=True)]
        try:
            with left_as_found(pl_module), torch.enable_grad(), _Silenced(pl_module), warnings.catch_warnings():
                # torch on operations that vmap has to loop over: nothing a user could change for a measurement.
                warnings.filterwarnings("ignore", "There is a performance drop")
                returned = pl_module.training_step(few, batch_idx)
                loss = returned["loss"] if isinstance(returned, Mapping) else returned
                torch.autograd.grad(cast(Tensor, loss), trained, allow_unused=True)
            names = {deq: name for name, deq in pl_module.named_modules() if deq in deqs}
            measured: dict[str, float] = {}
            for deq, reference, mode in zip(deqs, references, modes, strict=True):
                prefix = f"alignment/{names[deq]}/" if len(deqs) > 1 else "alignment/"
                for capture in reference.captures[:1]:
                    values = self._compare(capture, mode, metric, pl_module)
                    measured |= {f"{prefix}{name}": value for name, value in values.items()}
        finally:
            for handle in handles:
                handle.remove()
        return measured

    def _mode(self, deq: nn.Module, metric: Any) -> Mode:
        rule = _rule(deq)
        if self.backward is None and rule is not None and isinstance(rule.mode, (EquilibriumPropagation, PerSample)):
            return rule.mode
        options = {} if metric is None else {"metric": metric}
        return cast(Mode, get_backward(self.backward or "ep", **options))

    def _compare(self, capture: Capture, mode: Mode, metric: Any, pl_module: LightningModule) -> dict[str, float]:
        equilibrium = capture.equilibrium
        exact = capture.exact
        with capture.autocast.restored(True):
            values = {"residual": equilibrium.residual, "symmetry": self._symmetry(equilibrium, mode, metric)}
            try:
                estimate = mode.solve(equilibrium)[0].to(exact)
            except EPError:  # a nudge that diverges is aligned with nothing
                return values | {"cosine": math.nan}
        values["cosine"] = _cosine(estimate, exact)
        for name, part in (named(pl_module, self.parts)() if self.parts else {}).items():
            values[f"cosine/{name}"] = _cosine(estimate[:, part], exact[:, part])
        return values

    def _symmetry(self, equilibrium: Equilibrium, mode: Mode, metric: Any) -> float:
        """Of `J M`, which is the Jacobian of `w -> f(z* + M w)` at 0."""
        f, z = equilibrium.f, equilibrium.z
        inner = mode.mode if isinstance(mode, PerSample) else mode
        m, _ = diagonal_metric(metric or getattr(inner, "metric", None), f, z)
        generator = torch.Generator(z.device).manual_seed(0)
        scaled = f if m is None else lambda w: f(z + m * w)
        return symmetry_score(scaled, z if m is None else torch.zeros_like(z), self.probes, generator=generator)


class _Silenced:
    """A context in which `self.log` of a LightningModule does nothing."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._namespace = vars(pl_module)

    def __enter__(self) -> None:
        self._before = self._namespace.get("log")
        self._namespace["log"] = lambda *_, **__: None

    def __exit__(self, *_: object) -> None:
        del self._namespace["log"]
        if self._before is not None:
            self._namespace["log"] = self._before


def _first_rows(batch: Any, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:rows]
    if isinstance(batch, Mapping):
        return type(batch)({key: _first_rows(value, rows) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_first_rows(value, rows) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_first_rows(value, rows) for value in batch)
    return batch


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = norm(one) * norm(other)
    return float((one * other).sum()) / lengths if lengths > 0 else math.nan
