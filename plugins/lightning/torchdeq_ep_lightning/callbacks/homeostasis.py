"""Jacobian homeostasis beside training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchdeq_ep import register_homeostasis
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import AUTO, TARGET, Direction, check_count, deqs_of, fixed_point
from torchdeq_ep_lightning.callbacks.attached import Attached
from torchdeq_ep_lightning.callbacks.lookup import loss_scale, named
from torchdeq_ep_lightning.callbacks.means import Measuring
from torchdeq_ep_lightning.callbacks.schedule import Unit, check_unit, current, read_schedule
from torchdeq_ep_lightning.flavour import LightningModule, Trainer


class Homeostasis(Measuring, Attached):
    """Jacobian homeostasis during training, without a change to `training_step`.

    The gradient of the penalty is added in the backward pass, or followed by a step of its own (`descent`). The probes
    depend on the seed, the step and the process alone, so a run that is resumed draws the same ones.

    Args:
        weight: Factor of the gradient of the penalty, or a dict of factors by the epoch or step from which they hold.
            With 0 the symmetry is measured and logged, and nothing changes. `"auto"`, along the error vector, finds it;
            where it stands is saved with the run.
        descent: `False`: the weighted penalty is added to the loss, as in the papers, and the optimiser mixes the two
            gradients. `True`: after each step of the optimisers the parameters take a step of plain gradient descent
            on the penalty. `weight` is then its learning rate for each entry of the state of one sample, by whose
            number the penalty is divided, times the share of its highest rate at which the first optimiser goes. The
            state then has one row for each sample.
        by: Whether the keys of a dict count epochs or steps.
        every: Penalise at every so many batches.
        probes: Gaussian probes each time.
        estimator: `"antisymmetric"`, `"paper"`, or `"error-vector"`, for DEQs whose backward is switched; see
            [`register_homeostasis`][torchdeq_ep.register_homeostasis].
        target: Of `weight="auto"`.
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
        weight: float | dict[int, float] | Literal["auto"] = 0.1,
        descent: bool = False,
        by: Unit = "epoch",
        every: int = 1,
        probes: int = 5,
        estimator: Direction = "antisymmetric",
        target: float = TARGET,
        metric: str | None = None,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        check_unit(by)
        check_count("every", every)
        check_count("probes", probes)
        if estimator == "error-vector" and descent:
            raise InvalidOptionError(
                "descent=True takes the gradient of the penalty before the backward pass of the loss, in which the "
                "error vector is found: use estimator='antisymmetric', or descent=False."
            )
        self.is_automatic = weight == AUTO
        if self.is_automatic and estimator != "error-vector":
            raise InvalidOptionError("weight='auto' goes with estimator='error-vector'.")
        self.schedule = read_schedule("weight", 0.0 if weight == AUTO else weight)
        for value in self.schedule.values():
            if not 0 <= value < math.inf:
                raise InvalidOptionError(f"weight must be a number of at least 0, not {value!r}.")
        self.by, self.every, self.seed, self.enabled = by, every, seed, enabled
        self.metric, self.descent = metric, descent
        self.options: dict[str, Any] = {"probes": probes, "estimator": estimator, "target": target}
        self._registered: Any = None
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._share: float | None = None
        self._remembered: dict[str, Any] = {}

    def weight_at(self, epoch: int, step: int) -> float:
        """The weight at an epoch and step."""
        return float(current(self.schedule, epoch if self.by == "epoch" else step))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.is_automatic and self._registered is not None:
            return
        self._remove()
        if not self.enabled or (batch_idx % self.every and not self.is_automatic):
            return
        # One registration for each batch: its probes then follow from the step, without a state to be saved.
        key = repr((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
        weight = self.weight_at(trainer.current_epoch, trainer.global_step)
        self._registered = register_homeostasis(
            pl_module,
            AUTO if self.is_automatic else self._rates(pl_module, weight) if self.descent else weight,
            metric=named(pl_module, self.metric),
            inject=False if self.descent else partial(loss_scale, trainer),
            seed=int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"),
            **self.options,
        )
        if self.is_automatic and self._remembered:
            self._registered.load_state_dict(self._remembered)

    def state_dict(self) -> dict[str, Any]:
        """Where automatic weights stand."""
        return self._remembered if self._registered is None else dict(self._registered.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Used at the next batch."""
        self._remembered = state_dict

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
        # LBFGS evaluates the loss several times for one step: the first tells where the step began.
        if penalty is None or not penalty.requires_grad or self._share is not None:
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
        # Of the step that comes: schedules go on before the batch ends.
        self._share = _share_of_rate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._share is not None:
            self._descend(trainer, self._share)
        last = None if self._registered is None else self._registered.last
        if not self.is_automatic:
            self._remove()
        if last is not None:
            values = {"penalty": last.penalty, "weighted": last.weighted, "symmetry": last.symmetry}
            if last.alignment:
                values |= {"alignment": min(last.alignment.values()), "weight": max(last.weights.values())}
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._means.add({f"homeostasis/{name}": value for name, value in finite.items()})
        self._means.end_batch(trainer, batch_idx)

    def _descend(self, trainer: Trainer, share: float) -> None:
        with torch.no_grad():
            for parameter, gradient in self._gradients.items():
                parameter.sub_(trainer.strategy.reduce(gradient, reduce_op="mean"), alpha=share)
        self._gradients, self._share = {}, None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _remove(self) -> None:
        self._remembered = self.state_dict()
        for handle in [*self._handles, *([] if self._registered is None else [self._registered])]:
            handle.remove()
        self._handles, self._registered = [], None


def _share_of_rate(trainer: Trainer) -> float:
    """At which share of its highest learning rate the first optimiser goes, by its group of the highest rate.

    That is the initial rate of a schedule that falls or multiplies it. One-cycle schedules leave a higher one in the
    group, and cyclic ones have it themselves. No share is above 1.
    """
    groups = trainer.optimizers[0].param_groups
    peaks = [max(group.get("initial_lr", group["lr"]), group.get("max_lr", 0.0)) for group in groups]
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is trainer.optimizers[0]:
            peaks = [max(pair) for pair in zip(peaks, getattr(config.scheduler, "max_lrs", peaks), strict=True)]
    highest, present = max((float(peak), float(group["lr"])) for peak, group in zip(peaks, groups, strict=True))
    return min(present / highest, 1.0) if highest > 0 else 0.0
