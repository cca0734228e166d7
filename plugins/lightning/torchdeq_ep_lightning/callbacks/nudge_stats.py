"""What the solves of each training step did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchdeq_ep import EquilibriumPropagation, ImplicitDifferentiation
from torchdeq_ep.extend import deqs_of
from torchdeq_ep_lightning.callbacks.attached import Attached
from torchdeq_ep_lightning.callbacks.lookup import rule_of
from torchdeq_ep_lightning.callbacks.means import Measuring
from torchdeq_ep_lightning.callbacks.per_sample import PerSample
from torchdeq_ep_lightning.flavour import LightningModule, Trainer


class NudgeStats(Measuring, Attached):
    """Log what the solves of a training step did: steps, calls, amplitude, residual, and how many went wrong.

    Under `nudge/`: `iterations`, `calls`, `beta` (relative), `residual`, the shares of solves that missed their
    tolerance (`unconverged`), diverged and had to halve the amplitude (`shrunk`), or fell back to implicit
    differentiation (`fallback`), for contours the estimated `truncation`, and what each pass reports of its own error
    at no cost: the `error` of the finite nudge, `adjoint_residual` and `inconsistency`. A plain torchdeq backward has
    `iterations` and `residual` alone. Under `free/`: `iterations` and relative `residual` of the free phase. All are
    means over the solves of an epoch, and residuals and iterations of torchdeq's solvers the largest over the rows.

    Example:
        >>> from torchdeq_ep_lightning import SwapBackward
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
            self._means.add(_named("free", _solver_numbers(output[1])))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _statistics(deq: nn.Module, statistics: Any) -> dict[str, float]:
    report = statistics.get("report")
    if report is None:
        return _named("nudge", _solver_numbers(statistics))
    values = {
        "iterations": float(report.iterations),
        "calls": float(report.calls),
        "residual": report.residual,
        "unconverged": float(not report.converged),
    }
    rule = rule_of(deq)
    if rule is not None and isinstance(rule.mode, (EquilibriumPropagation, PerSample)):
        values |= {
            "beta": report.beta,
            "shrunk": float(report.retries > 0),
            "fallback": float(report.backward.startswith(ImplicitDifferentiation.__name__)),
        }
    if report.beta and report.is_usable:
        values["error"] = report.nudge_error
    for name in ("truncation", "adjoint_residual", "inconsistency"):
        if math.isfinite(getattr(report, name)):
            values[name] = getattr(report, name)
    return _named("nudge", values)


def _named(phase: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{phase}/{name}": value for name, value in values.items()}


def _solver_numbers(statistics: Any) -> dict[str, float]:
    """What a solver of torchdeq tells; nothing where it is another's, whose statistics are its own."""
    names = {"nstep": "iterations", "rel_lowest": "residual"}
    found = {name: statistics.get(key) for key, name in names.items()} if isinstance(statistics, Mapping) else {}
    return {name: float(value.max()) for name, value in found.items() if isinstance(value, Tensor) and value.numel()}
