"""A small deep-equilibrium model of handwritten digits, trained by equilibrium propagation in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq import get_deq

from torchdeq_ep.host import use_backward
from torchdeq_ep.measuring.files import require

Batch = tuple[Tensor, Tensor]

_STATE, _PIXELS, _CLASSES = 64, 64, 10
_BATCH, _EPOCHS, _TRAINED = 64, 3, 1437
_SEED = 0


class DigitsModel(nn.Module):
    """`z = tanh(W z + U x + b)`, read out linearly. Smooth, so that finite nudges have no floor.

    Example:
        >>> DigitsModel()(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.Linear(_STATE, _STATE, bias=False)
        self.inject = nn.Linear(_PIXELS, _STATE)
        self.read_out = nn.Linear(_STATE, _CLASSES)
        self.deq = get_deq(f_solver="fixed_point_iter", f_max_iter=40, f_tol=1e-5, f_stop_mode="rel")
        nn.init.normal_(self.recurrent.weight, std=0.2 / _STATE**0.5)  # spectral norm about 0.4: well contractive

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the ten digits for rows of 64 pixels."""
        drive = self.inject(pixels)
        states, _ = self.deq(lambda z: torch.tanh(self.recurrent(z) + drive), torch.zeros_like(drive))
        logits: Tensor = self.read_out(states[-1])
        return logits


@dataclass(frozen=True)
class TrainedDigits:
    """A trained model, a batch it has not seen, its loss, and its accuracy on all images it has not seen."""

    model: DigitsModel
    batch: Batch
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    accuracy: float


def load_digits() -> Batch:
    """scikit-learn's handwritten digits.

    Returns:
        Pixels of shape `(1797, 64)` between 0 and 1, and the digits.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    data = require("sklearn.datasets", "scikit-learn", "The digits example").load_digits()
    return torch.as_tensor(data.data, dtype=torch.float32) / 16, torch.as_tensor(data.target)


def train_digits(backward: str = "ep", on_step: Callable[[int, int], None] | None = None) -> TrainedDigits:
    """Train the model on scikit-learn's digits, with the gradients of a backward mode.

    Args:
        backward: Name or spec of the mode.
        on_step: Called after each step with the number of steps done and their total, to show progress.

    Returns:
        The model and what it takes to compare backward modes on it. The caller's random state is left alone.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        UnknownBackwardError: If no backward mode has that name.
    """
    pixels, digits = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        order = torch.randperm(len(pixels))
        seen, unseen = order[:_TRAINED], order[_TRAINED:]
        model = DigitsModel()
        # The recurrent weights learn slowly, so that the map stays contractive without a weight norm.
        slow, fast = [model.recurrent.weight], [*model.inject.parameters(), *model.read_out.parameters()]
        optimizer = torch.optim.Adam([{"params": slow, "lr": 3e-4}, {"params": fast, "lr": 5e-3}])
        batches = [rows for _ in range(_EPOCHS) for rows in torch.split(seen[torch.randperm(len(seen))], _BATCH)]
        with use_backward(model, backward):
            for step, rows in enumerate(batches, start=1):
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(pixels[rows]), digits[rows]))
                optimizer.step()
                if on_step is not None:
                    on_step(step, len(batches))
    optimizer.zero_grad()
    with torch.no_grad():
        right = model(pixels[unseen]).argmax(dim=1) == digits[unseen]
    batch = pixels[unseen[:_BATCH]], digits[unseen[:_BATCH]]
    return TrainedDigits(model, batch, functional.cross_entropy, float(right.float().mean()))


def digits_problem() -> tuple[nn.Module, Batch, Callable[[Tensor, Tensor], Tensor]]:
    """The trained model as a factory of the form that `torchdeq-ep compare` takes.

    Returns:
        The model, a batch and its loss.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.

    Example:
        >>> from torchdeq_ep.measuring.comparison import compare
        >>> table = compare(*digits_problem(), backwards=["ift", "ep"], repeats=1)
        >>> table.reference, table.state_entries
        ('dense', 4096)
    """
    trained = train_digits()
    return trained.model, trained.batch, trained.loss_fn
