"""The papers' classifiers as a LightningModule: a vector-field network, its loss, its optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor

from torchdeq_ep import nudge_loss
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import EquilibriumRule, check_choice, check_count, deqs_of, find_solver
from torchdeq_ep.nn import VectorField, VectorFieldCNN, VectorFieldMLP, dsilu, shifted_dsilu, shifted_sigmoid
from torchdeq_ep_lightning.callbacks import Means
from torchdeq_ep_lightning.flavour import LightningModule

ActivationName = Literal["shifted-sigmoid", "dsilu", "shifted-dsilu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted-sigmoid": shifted_sigmoid,
    "dsilu": dsilu,
    "shifted-dsilu": shifted_dsilu,
}


class VectorFieldClassifier(LightningModule):
    """A vector-field network of Laborieux & Zenke (arXiv 2309.02214) that classifies images.

    Args:
        shape: Channels, height and width of an image.
        n_classes: Number of classes.
        network: `"mlp"` or `"cnn"`.
        hidden: Units of the layers of the state, named `l1`, `l2`, ...; or their channels.
        connections: `"source-target"` of an MLP; by default each layer to the next and back. `in` is the image, `out`
            the logits.
        activation: `"shifted-sigmoid"`, `"dsilu"`, or `"shifted-dsilu"`, the one that the papers call dSiLU.
        angle: Initial angle in degrees between backward and transposed forward weights.
        damping: Share of the old state kept in each step.
        gain: Factor of the initial weights between layers of the state.
        feedback: Strength of backward relative to forward weights for which EP is exact, in an MLP.
        backward_norm: Initial norm of backward weights in an MLP: `"forward"`, that of the forward ones, or
            `"fan-in"`, as in the papers' code; see [`VectorFieldMLP`][torchdeq_ep.nn.VectorFieldMLP].
        temperature: Of the softmax pooling.
        last_padding: Of the last convolution of a CNN: `"same"`, or `"valid"` for none, as in the papers.
        free_steps: Largest number of steps of the free phase.
        free_tol: Relative residual at which it stops.
        free_solver: Solver of the free phase: one of torchdeq's, or `"relaxation"`, the one of this package.
        nudging: `"loss"`: the force of the nudge is the gradient of the loss at the nudged state, as in the papers.
            `"cotangent"`: that at the free state.
        optimizer: `"sgd"` or `"adamw"`.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Added to the gradient (SGD), or decoupled (AdamW).
        lr_factors: Multiply the learning rate of each layer of a CNN, forward and backward weights alike.
        readout_lr_factor: Multiplies that of the read-out.
        readout_decay_factor: Multiplies the weight decay of the read-out.
        schedule: `"constant"`, or `"cosine"` to zero over the training, at every step. A run that is made longer goes
            on by the schedule of the longer one.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> model = VectorFieldClassifier((1, 8, 8), 10, hidden=[16, 16, 10])
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_classes: int,
        network: Literal["mlp", "cnn"] = "mlp",
        hidden: Sequence[int] = (256, 256, 10),
        connections: list[str] | None = None,
        activation: ActivationName = "shifted-sigmoid",
        angle: float = 0.0,
        damping: float = 0.0,
        gain: float = 1.0,
        feedback: float = 1.0,
        backward_norm: Literal["forward", "fan-in"] = "forward",
        temperature: float = 1.0,
        last_padding: Literal["same", "valid"] = "same",
        free_steps: int = 150,
        free_tol: float = 1e-4,
        free_solver: str = "relaxation",
        nudging: Literal["loss", "cotangent"] = "loss",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lr_factors: list[float] | None = None,
        readout_lr_factor: float = 1.0,
        readout_decay_factor: float = 1.0,
        schedule: Literal["constant", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        check_choice("model.activation", activation, _ACTIVATIONS)
        _check_optimizer(lr, momentum, weight_decay)
        _check_free_phase(free_steps, free_tol, free_solver)
        _check_lr_factors(lr_factors, network, hidden)
        options: dict[str, Any] = {
            "phi": _ACTIVATIONS[activation],
            "damping": damping,
            "gain": gain,
            "angle": angle,
            "f_max_iter": free_steps,
            "f_tol": free_tol,
            "f_solver": free_solver,
        }
        self.network: VectorField
        if network == "mlp":
            sizes = _sizes(shape, hidden, n_classes)
            options |= {"feedback": feedback, "backward_norm": backward_norm}
            self.network = VectorFieldMLP(sizes, connections, readout="softmax", **options)
        elif connections is not None:
            raise InvalidOptionError("model.connections are those of an MLP: a CNN is a chain of layers.")
        else:
            options |= {"temperature": temperature, "last_padding": last_padding}
            self.network = VectorFieldCNN(shape, hidden, n_classes, **options)
        self.nudging = nudging
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.lr_factors = lr_factors
        self.readout_factors = (readout_lr_factor, readout_decay_factor)
        self.schedule = schedule
        self._labels: Tensor | None = None
        self._counts: list[Tensor] = []
        self._means = Means()
        self._measured: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the equilibrium."""
        logits: Tensor = self.network(images.flatten(1) if isinstance(self.network, VectorFieldMLP) else images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, self._labels = batch
        logits = self(images)
        loss = self.network.loss(logits, self._labels)
        wrong = (logits.argmax(1) != self._labels).float().mean()
        told, share = torch.stack([loss.detach().float(), wrong]).tolist()
        self._measured = {"train/loss": told, "train/error": 100 * share}
        return {"loss": loss}

    def on_after_backward(self) -> None:
        self._means.add(self._measured)  # not in training_step, which a monitor may call too

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict(self._means.end_batch(self.trainer, batch_idx), prog_bar=True, logger=False)

    def on_train_epoch_end(self) -> None:
        self._means.end_epoch(self, prog_bar=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        nudged = any(isinstance(rule, EquilibriumRule) for deq in deqs_of(self) for rule in deq.produce_grad)
        context = (
            nudge_loss(self.network, self.network.loss_of_state(cast(Tensor, self._labels)))
            if self.nudging == "loss" and nudged
            else nullcontext()
        )
        with context:
            super().backward(loss, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["means"] = self._means.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "means" in checkpoint:
            self._means.load_state_dict(checkpoint["means"])

    def on_validation_epoch_start(self) -> None:
        self._counts = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if not len(images):  # the share of a process in the last batch
            return
        logits = self(images)
        loss = self.network.loss(logits, labels).float() * len(images)
        wrong = (logits.argmax(1) != labels).sum()
        self._counts.append(torch.stack([loss, wrong.float(), torch.full_like(loss, len(images))]))

    def on_validation_epoch_end(self) -> None:
        # Single precision has whole numbers up to 16 million, and not every device has more.
        total = sum(self._counts, torch.zeros(3, dtype=torch.float32, device=self.device))
        loss, wrong, count = cast(Tensor, self.trainer.strategy.reduce(total, reduce_op="sum"))
        values = {"test/loss": loss / count, "test/error": 100 * wrong / count, "angle": self.angle()}
        self.log_dict(
            {name: value for name, value in values.items() if value is not None}, prog_bar=True, sync_dist=True
        )

    def angle(self) -> float | None:
        """Mean angle between backward and transposed forward weights, in degrees; `None` without such pairs."""
        angles = self.network.connection_angles().values()
        return sum(angles) / len(angles) if angles else None

    def parts(self) -> dict[str, slice]:
        """Where each layer of an MLP lies in the state."""
        return self.network.slices() if isinstance(self.network, VectorFieldMLP) else {}

    def configure_optimizers(self) -> Any:
        groups = [self._group(name, parameter) for name, parameter in self.network.named_parameters()]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, self.lr, self.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, self.lr)
        if self.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(int(self.trainer.estimated_stepping_batches)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        # A run that has been made longer goes on by the schedule of the longer one.
        for config in self.trainer.lr_scheduler_configs:
            scheduler = cast(torch.optim.lr_scheduler.LambdaLR, config.scheduler)
            rates = zip(self.optimizers().param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)  # type: ignore[union-attr]
            for group, highest, factor in rates:
                group["lr"] = highest * factor(scheduler.last_epoch)

    def _group(self, name: str, parameter: Tensor) -> dict[str, Any]:
        lr_factor, decay_factor = self._factors(name)
        return {
            "params": [parameter],
            "lr": self.lr * lr_factor,
            "weight_decay": self.weight_decay * decay_factor,
        }

    def _factors(self, name: str) -> tuple[float, float]:
        """Of learning rate and weight decay of a parameter of the network."""
        kind, _, rest = name.partition(".")
        if kind == "head" or name.endswith("-out") or name == "biases.out":
            return self.readout_factors
        if self.lr_factors is None:
            return 1.0, 1.0
        # Layer k + 1 is reached by forward weight k + 1, and left backwards by backward weight k.
        return self.lr_factors[int(rest) + (kind == "backward_weights")], 1.0


def _cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: from 1 to 0 over so many steps."""
    return lambda step: (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))) / 2


def _check_optimizer(lr: float, momentum: float, weight_decay: float) -> None:
    if not lr > 0 or not 0 <= momentum < 1 or weight_decay < 0:
        raise InvalidOptionError(
            f"model.lr must be positive, model.momentum in [0, 1), model.weight_decay at least 0, not {lr}, "
            f"{momentum} and {weight_decay}."
        )


def _check_free_phase(steps: int, tol: float, solver: str) -> None:
    check_count("model.free_steps", steps)
    if not tol > 0:
        raise InvalidOptionError(f"model.free_tol must be positive, not {tol}.")
    find_solver(solver)


def _check_lr_factors(factors: list[float] | None, network: str, hidden: Sequence[int]) -> None:
    if factors is not None and (network != "cnn" or len(factors) != len(hidden)):
        raise InvalidOptionError(
            f"model.lr_factors has one number for each layer of a CNN, not {factors} with "
            f"model.network={network} and model.hidden={list(hidden)}."
        )


def _sizes(shape: tuple[int, int, int], hidden: Sequence[int], n_classes: int) -> dict[str, int]:
    """Units of the layers of an MLP by their names."""
    layers = {f"l{k}": size for k, size in enumerate(hidden, start=1)}
    return {"in": math.prod(shape), **layers, "out": n_classes}
