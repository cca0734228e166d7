"""Jacobian homeostasis beside training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchdeq_ep import register_homeostasis
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import Estimator, check_count, deqs_of, fixed_point
from torchdeq_ep_lightning.callbacks.attached import Attached
from torchdeq_ep_lightning.callbacks.lookup import loss_scale, named
from torchdeq_ep_lightning.callbacks.means import Measuring
from torchdeq_ep_lightning.callbacks.schedule import Unit, check_unit, current, read_schedule


class Homeostasis(Measuring, Attached):
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
        check_unit(by)
        check_count("every", every)
        check_count("probes", probes)
        self.schedule = read_schedule("weight", weight)
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
