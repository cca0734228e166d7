"""Training with another backward pass than the module was built with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

from torchdeq_ep import EquilibriumPropagation, Stencil, get_backward, use_backward
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import BackwardHandle, ModeLike, OnDivergence, check_choice, deqs_of
from torchdeq_ep_lightning.callbacks.attached import Attached
from torchdeq_ep_lightning.callbacks.lookup import loss_scale, named
from torchdeq_ep_lightning.callbacks.per_sample import PerSample
from torchdeq_ep_lightning.callbacks.schedule import Unit, check_unit, current, read_schedule
from torchdeq_ep_lightning.flavour import LightningModule, Trainer

AmplitudeScale = Literal["relative", "absolute", "per-sample"]


class SwapBackward(Attached):
    """Train with another backward pass, or with one after the other.

    Args:
        backward: Spec of a mode, a mode, or a dict of these by the epoch or step from which they hold: `{0: "ift",
            2: "hep"}` warms up with exact gradients.
        by: Whether the keys of a dict count epochs or optimiser steps.
        metric: Dotted path of a metric in the LightningModule, such as `"network.metric"`, for the modes that take one.
        amplitude: `"relative"` and `"absolute"` as in
            [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation]. `"per-sample"`: `beta` is the factor of the
            gradient of each sample's loss, as in the papers; for a loss that is a mean over the batch, and a state
            with one row for each sample, in each of its tensors if there are several.
        beta: Amplitude of the modes whose spec does not give one; by default chosen by the mode.
        max_iter: Largest number of steps of a nudged or adjoint phase, where the spec does not give it.
        tol: Residual at which such a phase stops, likewise.
        on_divergence: What becomes of a phase that does not get there, likewise: `"shrink"`, `"accept"`, `"ift"` or
            `"raise"`, see [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation]. A mode that is no spec keeps
            its own.

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
        amplitude: AmplitudeScale = "relative",
        beta: float | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        on_divergence: OnDivergence | None = None,
    ) -> None:
        check_unit(by)
        check_choice("amplitude", amplitude, get_args(AmplitudeScale))
        self.schedule = read_schedule("backward", backward)
        self.by, self.metric, self.amplitude, self.beta = by, metric, amplitude, beta
        if on_divergence is not None:
            check_choice("on_divergence", on_divergence, get_args(OnDivergence))
        self.options = {"max_iter": max_iter, "tol": tol}
        self.on_divergence = on_divergence
        for spec in self.schedule.values():
            self._mode(spec, None, lambda: 1.0)
        self._handle: BackwardHandle | None = None
        self._in_force: Any = None
        self._remembered: dict[str, Any] = {}

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
        if self.on_divergence is not None and isinstance(spec, str) and "on_divergence" not in spec:
            options |= {field.name: self.on_divergence for field in fields(mode) if field.name == "on_divergence"}
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
            if self._remembered.get("backward") == repr(spec):
                self._handle.load_state_dict(self._remembered["deqs"])
            self._remembered = {}

    def state_dict(self) -> dict[str, Any]:
        """What the DEQs remember of their passes, so that a resumed run measures when the whole one does."""
        deqs = {} if self._handle is None else self._handle.state_dict()
        return {"backward": repr(self._in_force), "deqs": deqs} if deqs else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Used at the next batch, if the schedule then names the same mode."""
        self._remembered = state_dict

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
