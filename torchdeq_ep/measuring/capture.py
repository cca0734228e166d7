"""Equilibria as a backward pass of a model meets them, with their exact adjoints; the model is left as it was found."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError, NonFiniteError
from torchdeq_ep.host import use_backward
from torchdeq_ep.jacobian import dense_jacobian
from torchdeq_ep.modes import ImplicitDifferentiation, Mode, ModeLike, NudgeReport
from torchdeq_ep.state import Autocast, Equilibrium, norm, undisturbed

LARGEST_DENSE = 4096
"""States with more entries than this have no dense reference: the Jacobian would not fit."""
REFERENCE_STEPS = 1000
_NOTE_LENGTH = 160


@dataclass(frozen=True)
class Found:
    """Buffers and random state of a model, as they were found."""

    buffers: tuple[tuple[nn.Module, str, Tensor, Tensor], ...]
    random_state: Tensor
    random_states_cuda: tuple[Tensor, ...]

    @classmethod
    def on(cls, model: nn.Module) -> Found:
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if in_use else []
        return cls(tuple(buffers), torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        torch.set_rng_state(self.random_state)
        if self.random_states_cuda:
            torch.cuda.set_rng_state_all(list(self.random_states_cuda))
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):  # writing needlessly would invalidate graphs that saved the buffer
                    buffer.copy_(value)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[Found]:
    """A context at whose end buffers, random state and training mode of a model are what they were at its start."""
    found = Found.on(model)
    training = [(module, module.training) for module in model.modules()]
    try:
        yield found
    finally:
        found.restore()
        for module, was_training in training:
            module.training = was_training


@dataclass(frozen=True)
class Trial:
    """A model with a batch and a loss, which can be differentiated over and over from the same random state."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Tensor]
    parameters: list[nn.Parameter]
    found: Found

    def gradient(self, mode: ModeLike) -> tuple[list[Tensor], tuple[str, ...]]:
        """The gradient of each parameter under a mode, and what the backward pass warned about."""
        self.found.restore()
        with use_backward(self.model, mode):
            loss = loss_of(self.model, self.batch, self.loss_fn)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InvalidOptionError(
                    f"loss_fn must return a scalar that depends on the parameters of the model; got {got}"
                    f"{' without a gradient' if isinstance(loss, Tensor) and not loss.requires_grad else ''}."
                )
            with caught_warnings() as notes:
                # The graph may be shared with weights that the caller's reset_deq has computed: keep it.
                gradients = torch.autograd.grad(
                    loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
        return list(gradients), tuple(notes)


def loss_of(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
    """The loss of a model on a batch, by the rules that [`compare`][torchdeq_ep.measuring.compare] documents.

    Args:
        model: The model.
        batch: A pair of inputs and targets, or anything else.
        loss_fn: The loss.

    Returns:
        What `loss_fn` returns.

    Example:
        >>> import torch
        >>> loss_of(torch.nn.Identity(), (torch.ones(2), torch.zeros(2)), torch.nn.functional.mse_loss)
        tensor(1.)
        >>> loss_of(torch.nn.Identity(), torch.ones(2), torch.sum)
        tensor(2.)
    """
    if _first_parameter(loss_fn) == "model":
        return loss_fn(model, batch)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        return loss_fn(model(batch))
    inputs, targets = batch
    if isinstance(inputs, dict):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return loss_fn(outputs, targets)


def _first_parameter(function: Callable[..., Any]) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):  # a builtin has no signature
        return None


@dataclass(frozen=True)
class Capture:
    """An equilibrium as the backward pass met it, with its exact adjoint in float64 and how that was found."""

    equilibrium: Equilibrium
    autocast: Autocast
    exact: Tensor
    method: str


@dataclass(frozen=True, eq=False)
class Reference(Mode):
    """A backward mode that is exact, and keeps every equilibrium it is given."""

    captures: list[Capture] = field(default_factory=list)

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        equilibrium.require_finite()
        with undisturbed():
            return self._solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        if norm(equilibrium.cotangent) == 0.0:
            return torch.zeros_like(equilibrium.z), NudgeReport("reference")
        if equilibrium.z.numel() <= LARGEST_DENSE:
            exact, method = dense_adjoint(equilibrium), "dense"
        else:
            tight = ImplicitDifferentiation(max_iter=REFERENCE_STEPS, tol=equilibrium.eps)
            exact, method = tight.solve(equilibrium)[0].double(), "ift"
        autocast = Autocast.current(equilibrium.z.device.type)
        self.captures.append(Capture(equilibrium, autocast, exact, method))
        return exact.to(equilibrium.z.dtype), NudgeReport("reference")


def dense_adjoint(equilibrium: Equilibrium) -> Tensor:
    """`(I - J^T)^-1 g` with the dense Jacobian in the dtype of the state, and the linear system in float64.

    Args:
        equilibrium: A free equilibrium of moderate size.

    Returns:
        A float64 tensor of the shape of the state.

    Raises:
        NonFiniteError: If `I - J` is singular.

    Example:
        >>> import torch
        >>> matrix, ones = torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.ones(2)
        >>> dense_adjoint(Equilibrium(lambda z: matrix @ z, torch.zeros(2), torch.zeros(2), ones, 1e-7))
        tensor([1.0000, 1.5000], dtype=torch.float64)
    """
    matrix = dense_jacobian(equilibrium.f, equilibrium.z).double().neg_().T
    matrix.diagonal().add_(1.0)
    solution, status = torch.linalg.solve_ex(matrix, equilibrium.cotangent.double().flatten())
    if int(status) != 0 or not bool(torch.isfinite(solution).all()):
        raise NonFiniteError(
            "I - J is singular at the fixed point, so no gradient exists that modes could be compared with. Look for a "
            "direction that f passes on unchanged, such as a residual connection without a final norm."
        )
    adjoint: Tensor = solution.reshape(equilibrium.z.shape)
    return adjoint


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """Warnings in short, kept instead of printed; the list is filled on exit."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # says nothing about the model
        yield notes
    notes.extend(short(warning.message) for warning in caught)


def short(problem: Warning | Exception | str) -> str:
    """Class and first sentence of an exception or warning."""
    first_line = (str(problem).strip().splitlines() or [""])[0]
    sentence = first_line.partition(". ")[0].rstrip(".")
    if len(sentence) > _NOTE_LENGTH:
        sentence = f"{sentence[:_NOTE_LENGTH].rpartition(' ')[0]} ..."
    return f"{type(problem).__name__}: {sentence}"
