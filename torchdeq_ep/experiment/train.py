"""One run of the experiment: a vector-field MLP trained with one kind of gradient, measured after every epoch."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.errors import ConvergenceWarning, EPError, InvalidOptionError
from torchdeq_ep.experiment.data import Images
from torchdeq_ep.host import HomeostasisHandle, register_homeostasis, relaxation_solver, use_backward
from torchdeq_ep.modes import EquilibriumPropagation, ImplicitDifferentiation
from torchdeq_ep.nn.vector_field.base import Readout
from torchdeq_ep.nn.vector_field.mlp import VectorFieldMLP

Mode = Literal["ift", "ep", "ep-homeostasis"]
MODES: tuple[Mode, ...] = get_args(Mode)
OnStep = Callable[[int, int], None]

_MEASURED = 200
_TEST_BATCH = 500
_TRAINING_TOL = 1e-3
_ADJOINT_TOL = 1e-2
_MEASURING_TOL = 1e-5


@dataclass(frozen=True)
class Setup:
    """What all runs of an experiment share.

    Args:
        epochs: Passes over the training images.
        batch: Images per step.
        hidden: Sizes of the hidden layers.
        angle: Initial angle in degrees between backward and transposed forward weights.
        feedback: Strength of backward relative to forward weights that the metric takes for symmetric.
        readout: `"mse"` (output layer in the state) or `"softmax"`.
        damping: Share of the old state kept in each step of the map.
        gain: Factor of the initial recurrent weights.
        lr: Learning rate of Adam at the start; it falls to 0 along a cosine.
        strength: Learning rate of homeostasis per unit of the state, by whose number the penalty is divided: gradient
            descent on the penalty, beside Adam on the loss. It falls along the same cosine.
        probes: Probe vectors of the penalty, per step.

    Raises:
        InvalidOptionError: If a number is out of range.

    Example:
        >>> Setup(epochs=2, hidden=(64, 64)).angle
        90.0
    """

    epochs: int = 10
    batch: int = 100
    hidden: tuple[int, ...] = (256, 256)
    angle: float = 90.0
    feedback: float = 0.25
    readout: Readout = "softmax"
    damping: float = 0.3
    gain: float = 0.5
    lr: float = 1e-3
    strength: float = 0.5
    probes: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "probes"):
            if getattr(self, name) < 1:
                raise InvalidOptionError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if len(self.hidden) < (2 if self.readout == "softmax" else 1):
            raise InvalidOptionError(
                f"with readout={self.readout!r} and hidden={self.hidden} no two layers of the state are connected both "
                "ways, so there is nothing to align: add a hidden layer."
            )
        for name in ("lr", "strength"):
            if not getattr(self, name) > 0:
                raise InvalidOptionError(f"{name} must be positive, not {getattr(self, name)}.")

    def model(self, images: Images) -> VectorFieldMLP:
        """An untrained network for these images, drawn from torch's random state.

        Args:
            images: They give the sizes of the first and the last layer.

        Returns:
            The network, with a solver and tolerance for training.
        """
        hidden = {f"l{k}": size for k, size in enumerate(self.hidden, start=1)}
        return VectorFieldMLP(
            {"in": images.train_x.shape[1], **hidden, "out": images.n_classes},
            damping=self.damping,
            gain=self.gain,
            angle=self.angle,
            feedback=self.feedback,
            readout=self.readout,
            f_max_iter=60,
            f_solver="relaxation",
            f_tol=_TRAINING_TOL,
        )


@dataclass(frozen=True)
class Epoch:
    """Measurements after an epoch; number 0 is before learning.

    Args:
        epoch: Its number.
        loss: Mean loss over its steps; `None` before training.
        test_error: Share of the test images that are classified wrongly, in percent.
        cosine: Between the error vectors of EP and of the exact adjoint, on test images.
        symmetry: `tr(A^2) / |A|_F^2` of the off-diagonal part `A` of `J M`: 1 if symmetric, 0 if unrelated.
        angle: Mean angle between backward and transposed forward weights, in degrees.
        residual: Relative residual after a free phase as in training, on test images.
        unconverged: Steps of the epoch in which a phase did not reach its tolerance.
        seconds: Time since the start of training.

    Example:
        >>> before = Epoch(0, None, 90.0, 0.3, 0.0, 90.0, 1e-4, 0, 0.1)
        >>> before.loss is None, before.angle
        (True, 90.0)
    """

    epoch: int
    loss: float | None
    test_error: float
    cosine: float
    symmetry: float
    angle: float
    residual: float
    unconverged: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One training run: what it was, its epochs, and why it ended early, if it did.

    Args:
        mode: The kind of gradient.
        seed: The seed.
        epochs: Measurements before training and after each epoch that was finished.
        failure: The error that ended it, and where; empty if it ran to its end.

    Example:
        >>> Run("ep", 0, (), "epoch 1, step 3: NudgeDivergedError: ...").failure[:15]
        'epoch 1, step 3'
    """

    mode: Mode
    seed: int
    epochs: tuple[Epoch, ...]
    failure: str = ""

    @classmethod
    def of_json(cls, plain: dict[str, Any]) -> Run:
        """The run that `asdict` was made of.

        Args:
            plain: A dictionary of the fields, read from JSON.

        Returns:
            The run.
        """
        return cls(**(plain | {"epochs": tuple(Epoch(**epoch) for epoch in plain["epochs"])}))


def run_name(setup: Setup, mode: Mode, seed: int, images: Images) -> str:
    """A name by which the result of a run is found again: one for each mode, seed, setup and data.

    Args:
        setup: The setup; what only homeostasis uses counts only for that mode.
        mode: The kind of gradient.
        seed: The seed.
        images: The data.

    Returns:
        A file name without suffix.
    """
    if mode != "ep-homeostasis":
        setup = replace(setup, strength=Setup.strength, probes=Setup.probes)
    described = json.dumps([asdict(setup), images.digest()], sort_keys=True)
    return f"{mode}-seed{seed}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def train(setup: Setup, mode: Mode, seed: int, images: Images, on_step: OnStep | None = None) -> Run:
    """Train one network.

    Initial weights and the order of the images depend on the seed alone. A nudged phase that diverges ends the run;
    a phase that misses its tolerance is counted.

    Args:
        setup: What to train.
        mode: `"ift"`: exact gradients. `"ep"`: equilibrium propagation with the network's metric and a symmetric nudge.
            `"ep-homeostasis"`: the same, and after each step of Adam a step of gradient descent on the asymmetry of
            `J M`. Added to the loss instead, it would drown the loss in Adam's running scale of the gradient.
        seed: Any whole number.
        images: The data.
        on_step: Called after each step with the number of steps done and their total.

    Returns:
        The measurements. The caller's random state is left alone.

    Example:
        >>> from torchdeq_ep.experiment.data import load_images
        >>> run = train(Setup(epochs=1, batch=200, hidden=(16, 16)), "ep", 0, load_images())
        >>> [epoch.epoch for epoch in run.epochs]
        [0, 1]
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        model = setup.model(images)
        homeostasis = None
        if mode == "ep-homeostasis":
            homeostasis = register_homeostasis(model, 1.0, setup.probes, metric=model.metric, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=setup.lr)
        per_epoch = -(-len(images.train_x) // setup.batch)
        total = setup.epochs * per_epoch
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        start = time.perf_counter()
        epochs = [_measure(model, setup, images, Epoch(0, None, 0, 0, 0, 0, 0, 0, 0.0))]
        failure = ""
        backward = ImplicitDifferentiation(tol=_ADJOINT_TOL) if mode == "ift" else _ep(model, _ADJOINT_TOL)
        with use_backward(model, backward):
            for epoch in range(1, setup.epochs + 1):
                caught.clear()
                losses: list[float] = []
                unconverged = 0
                rows = torch.randperm(len(images.train_x), generator=order)
                try:
                    for batch in torch.split(rows, setup.batch):
                        strength = setup.strength * model.state_size * float(scheduler.get_last_lr()[0]) / setup.lr
                        x, y = images.train_x[batch], images.train_y[batch]
                        losses.append(_step(model, optimizer, homeostasis, strength, x, y))
                        scheduler.step()
                        unconverged += bool(caught)
                        caught.clear()
                        if on_step is not None:
                            on_step((epoch - 1) * per_epoch + len(losses), total)
                except EPError as error:
                    failure = f"epoch {epoch}, step {len(losses) + 1}: {type(error).__name__}: {error.args[0]}"
                    break
                done = Epoch(epoch, sum(losses) / per_epoch, 0, 0, 0, 0, 0, unconverged, time.perf_counter() - start)
                epochs.append(_measure(model, setup, images, done))
        return Run(mode, seed, tuple(epochs), failure)


def _ep(model: VectorFieldMLP, tol: float) -> EquilibriumPropagation:
    return EquilibriumPropagation("symmetric", metric=model.metric, tol=tol)


def _step(
    model: VectorFieldMLP,
    optimizer: torch.optim.Optimizer,
    homeostasis: HomeostasisHandle | None,
    strength: float,
    x: Tensor,
    y: Tensor,
) -> float:
    parameters = list(model.parameters())
    optimizer.zero_grad()
    loss = model.loss(model(x), y)
    torch.autograd.backward(loss)
    if homeostasis is None:
        optimizer.step()
        return float(loss.detach())
    gradients = torch.autograd.grad(homeostasis.penalty(), parameters, allow_unused=True)
    optimizer.step()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient, alpha=strength)
    return float(loss.detach())


def _measure(model: VectorFieldMLP, setup: Setup, images: Images, epoch: Epoch) -> Epoch:
    """The epoch with what is measured on test images filled in."""
    model.eval()  # homeostasis looks at training batches only
    with torch.no_grad():
        answers = torch.cat([model(x).argmax(1) for x in torch.split(images.test_x, _TEST_BATCH)])
        weight = model.dense_weight()
        weight = weight * model.layer_metric(weight)
        f = model.map(images.test_x[:_MEASURED])
        rough = _free_phase(f, model.initial_state(len(images.test_x[:_MEASURED])), 60, _TRAINING_TOL)
        state = _free_phase(f, rough, 500, _MEASURING_TOL)
        residual = float((f(rough) - rough).norm() / rough.norm())
    model.train()
    angles = model.connection_angles().values()
    return replace(
        epoch,
        test_error=100 * float((answers != images.test_y).float().mean()),
        cosine=_cosine(model, f, state, images.test_y[:_MEASURED]),
        symmetry=float((weight * weight.T).sum() / weight.square().sum()),
        angle=sum(angles) / len(angles),
        residual=residual,
    )


def _free_phase(f: Callable[[Tensor], Tensor], u: Tensor, max_iter: int, tol: float) -> Tensor:
    state: Tensor = relaxation_solver(f, u, max_iter=max_iter, tol=tol, stop_mode="rel")[0]
    return state


def _cosine(model: VectorFieldMLP, f: Callable[[Tensor], Tensor], state: Tensor, labels: Tensor) -> float:
    """Of the error vectors of EP and of the exact adjoint; not a number where either diverges."""
    point = state.clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(model.loss(model.read_out(point), labels), point)
    modes = (_ep(model, _TRAINING_TOL), ImplicitDifferentiation(tol=_TRAINING_TOL))
    try:
        ep, exact = (mode(f, state, cotangent) for mode in modes)
    except EPError:
        return float("nan")
    return float(functional.cosine_similarity(torch.as_tensor(ep).flatten(), torch.as_tensor(exact).flatten(), dim=0))
