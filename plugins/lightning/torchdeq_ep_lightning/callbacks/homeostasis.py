"""Jacobian homeostasis beside training."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any, Literal

from torchdeq_ep import register_homeostasis
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import AUTO, TARGET, Direction, check_count, deqs_of
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
            gradients. `True`: after each step of the first optimiser the parameters take a step of plain gradient
            descent on the penalty, and `weight` is the share of that step, at most 1; see
            [beside the optimiser](homeostasis.md#beside-the-optimiser).
        by: Whether the keys of a dict count epochs or steps.
        every: Penalise at every so many batches.
        probes: Gaussian probes each time.
        estimator: `"antisymmetric"`, `"paper"`, or `"error-vector"`, for DEQs whose backward is switched; see
            [`register_homeostasis`][torchdeq_ep.register_homeostasis].
        target: Of `weight="auto"`.
        metric: Dotted path of a metric in the LightningModule.
        seed: Seed of the probes.
        enabled: `False` makes this callback do nothing.
        chunk: How many probes have a graph in memory at a time; by default all.

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
        chunk: int | None = None,
    ) -> None:
        check_unit(by)
        check_count("every", every)
        check_count("probes", probes)
        check_count("chunk", 1 if chunk is None else chunk)
        self.is_automatic = weight == AUTO
        if self.is_automatic and (estimator != "error-vector" or every != 1):
            raise InvalidOptionError("weight='auto' goes with estimator='error-vector' and every=1.")
        self.schedule = read_schedule("weight", 0.0 if weight == AUTO else weight)
        for value in self.schedule.values():
            if not 0 <= value < math.inf or (descent and value > 1):
                allowed = "a share from 0 to 1, beside the optimiser" if descent else "a number of at least 0"
                raise InvalidOptionError(f"weight must be {allowed}, not {value!r}.")
        self.by, self.every, self.seed, self.enabled = by, every, seed, enabled
        self.metric, self.descent = metric, descent
        self.options: dict[str, Any] = {"probes": probes, "chunk": chunk, "estimator": estimator, "target": target}
        self._registered: Any = None
        self._batch = 0
        super().__init__()
        self._remembered: dict[str, Any] = {}

    def weight_at(self, epoch: int, step: int) -> float:
        """The weight at an epoch and step."""
        return float(current(self.schedule, epoch if self.by == "epoch" else step))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx
        if not self.enabled or self._registered is not None:
            return
        self._registered = register_homeostasis(
            pl_module,
            AUTO if self.is_automatic else partial(self._weight, trainer),
            metric=named(pl_module, self.metric),
            inject=False if self.descent else partial(loss_scale, trainer),
            descent=trainer.optimizers[0] if self.descent else None,
            seed=partial(self._seed, trainer),
            **self.options,
        )
        if self._remembered:
            self._registered.load_state_dict(self._remembered)

    def _weight(self, trainer: Trainer, _: int) -> float | None:
        if self._batch % self.every:
            return None
        return self.weight_at(trainer.current_epoch, trainer.global_step)

    def _seed(self, trainer: Trainer) -> int:
        """Of the probes of a batch: they follow from the step, without a state to be saved."""
        key = repr((self.seed, trainer.current_epoch, self._batch, trainer.global_rank))
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")

    def state_dict(self) -> dict[str, Any]:
        """Where automatic weights and descents stand."""
        return self._remembered if self._registered is None else dict(self._registered.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Used at the next batch."""
        self._remembered = state_dict

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = None if self._registered is None or batch_idx % self.every else self._registered.last
        if last is not None:
            values = {"penalty": last.penalty, "weighted": last.weighted, "symmetry": last.symmetry}
            if last.alignment:
                values |= {"alignment": min(last.alignment.values()), "weight": max(last.weights.values())}
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._means.add({f"homeostasis/{name}": value for name, value in finite.items()})
        self._means.end_batch(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _remove(self) -> None:
        self._remembered = self.state_dict()
        if self._registered is not None:
            self._registered.remove()
        self._registered = None
