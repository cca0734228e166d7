"""Equilibria as a backward pass of a model meets them, with their exact adjoints; the model is left as it was found."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq.core import DEQBase

from torchdeq_ep.errors import InvalidOptionError, NonFiniteError
from torchdeq_ep.host import deqs_of, use_backward
from torchdeq_ep.jacobian import dense_jacobian
from torchdeq_ep.loops import loops_by
from torchdeq_ep.measuring.restoring import Found, left_as_found
from torchdeq_ep.modes import ImplicitDifferentiation, Mode, ModeLike, NudgeReport
from torchdeq_ep.state import Autocast, Equilibrium, relative_difference, undisturbed

LARGEST_DENSE = 4096
"""States with more entries than this have no dense reference: the Jacobian would not fit."""
REFERENCE_STEPS = 1000
"""Largest number of products with `J^T` for the reference of a larger state."""
CERTAIN = 1e-3
"""A reference whose relative residual is above this is not exact enough to be called so."""
LOOP = "loop"
"""The name of what `tep.loop` ran, which is no module."""
_NOTE_LENGTH = 160


@dataclass(frozen=True)
class Trial:
    """A model with a batch and a loss, which can be differentiated over and over from the same state."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Tensor]
    parameters: list[nn.Parameter]
    found: Found

    def gradient(self, mode: ModeLike | Sequence[ModeLike] | None) -> tuple[list[Tensor], tuple[str, ...]]:
        """The gradient of each parameter from the state that was found, and what the backward pass warned about.

        Args:
            mode: One for all DEQs and loops; or one for each DEQ, in the order of `model.modules()`, and one for all
                loops; `None` for those that the model has.

        Returns:
            Gradients in the order of the parameters, zero where there is none; warnings in short.

        Raises:
            InvalidOptionError: If the loss is no scalar that can be differentiated.
        """
        self.found.restore()
        return self.go_on(mode)

    def go_on(self, mode: ModeLike | Sequence[ModeLike] | None) -> tuple[list[Tensor], tuple[str, ...]]:
        """The same, from the state that the model has now."""
        deqs = deqs_in(self.model)
        with ExitStack() as switched:
            if mode is not None:
                *of_deqs, of_loops = mode if isinstance(mode, Sequence) else [mode] * (len(deqs) + 1)
                for deq, own in zip(deqs, of_deqs, strict=True):
                    switched.enter_context(use_backward(deq, own))
                switched.enter_context(loops_by(of_loops))
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


@contextmanager
def trying(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor], parameters: list[nn.Parameter]
) -> Iterator[Trial]:
    """A context with a model in training, at whose end the model, the loss and the random states are as before.

    Args:
        model: The model.
        batch: As for [`compare`][torchdeq_ep.measuring.compare].
        loss_fn: Likewise.
        parameters: What gradients are wanted of.
    """
    with left_as_found(model, loss_fn) as found, torch.enable_grad():
        if not all(deq.training for deq in deqs_in(model)):
            model.train()
            found = Found.on(model, loss_fn)  # gradients are those of a model in training, whatever that changed in it
        yield Trial(model, batch, loss_fn, parameters, found)


def deqs_in(model: nn.Module) -> list[DEQBase]:
    """The DEQs of a model, of which there are none if it runs loops instead.

    Args:
        model: The model.

    Returns:
        DEQs in the order of `model.modules()`.
    """
    return deqs_of(model) if any(isinstance(part, DEQBase) for part in model.modules()) else []


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
class Adjoint:
    """What is known of the exact adjoint of an equilibrium.

    Args:
        vector: The error vector, in float64; NaN where there is none.
        method: `"dense"`: a linear system solved in float64. `"ift"`: implicit differentiation. `"least squares"`:
            `I - J` is singular, and this is what comes closest. `"zero"`: the cotangent is. `"none"`: there is none.
        residual: Of `v = J^T v + g`, relative to `g`; NaN where there is no vector.
        note: Why it is not exact, in short, or an empty text.

    Example:
        >>> Adjoint(torch.ones(2, dtype=torch.float64), "ift", residual=0.02).is_known
        False
    """

    vector: Tensor
    method: str
    residual: float
    note: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it is exact, for the purposes of a comparison."""
        return self.residual <= CERTAIN


@dataclass(frozen=True)
class Capture:
    """An equilibrium as the backward pass met it, with its exact adjoint in float64 and how that was found."""

    equilibrium: Equilibrium
    autocast: Autocast
    adjoint: Adjoint
    deq: str = ""

    @property
    def exact(self) -> Tensor:
        """The exact adjoint, in float64."""
        return self.adjoint.vector

    @property
    def method(self) -> str:
        """How it was found; see `Adjoint`."""
        return self.adjoint.method

    def anew(self) -> Capture:
        """The same for another mode, which is to be warned about by itself."""
        return replace(self, equilibrium=self.equilibrium.afresh())


@dataclass(frozen=True, eq=False)
class Reference(Mode):
    """A backward mode that is exact, and keeps every equilibrium it is given. It never raises: see `Adjoint.note`.

    Args:
        captures: The equilibria.
        deq: Name of the DEQ that it is the mode of.
        silent: Equilibria whose cotangent is zero, which have no part in the gradient.
        tol: Relative residual at which implicit differentiation stops, for states too large for a dense system; by
            default 10 times the rounding error.
        max_iter: Largest number of its products with `J^T`.
    """

    captures: list[Capture] = field(default_factory=list)
    deq: str = ""
    silent: list[Capture] = field(default_factory=list)
    tol: float | None = None
    max_iter: int = REFERENCE_STEPS

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        with undisturbed():
            return self._solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        found = exact_adjoint(equilibrium, self.tol, self.max_iter)
        capture = Capture(equilibrium, Autocast.current(equilibrium.z.device.type), found, self.deq)
        (self.silent if found.method == "zero" else self.captures).append(capture)
        report = NudgeReport("reference", residual=found.residual, converged=found.is_known)
        return found.vector.to(equilibrium.z.dtype), report


def capture_all(
    trial: Trial, tol: float | None = None, max_iter: int = REFERENCE_STEPS
) -> tuple[list[Tensor], tuple[Capture, ...], tuple[str, ...]]:
    """One exact backward pass, in which each DEQ has a reference of its own.

    Args:
        trial: The model.
        tol: As for `Reference`.
        max_iter: Likewise.

    Returns:
        The gradient of each parameter; the equilibria in the order of the backward pass, by name, those with a zero
        cotangent only if there is no other; and what there is to say of the reference.

    Raises:
        InvalidOptionError: If the loss reaches no equilibrium.
        NoDEQError: If there is neither a DEQ nor a loop.
    """
    names = {module: name for name, module in trial.model.named_modules()}
    captures: list[Capture] = []
    silent: list[Capture] = []
    deqs = [names[deq] for deq in deqs_in(trial.model)]
    references = [Reference(captures, name, silent, tol, max_iter) for name in (*deqs, LOOP)]
    gradient, notes = trial.gradient(references)
    found = _numbered(captures or silent)
    if not found and not deqs:
        deqs_of(trial.model)  # which says what is missing
    if not found:
        raise InvalidOptionError("the loss has no gradient with respect to an equilibrium of any DEQ in the model.")
    said = dict.fromkeys([*notes, *(capture.adjoint.note for capture in found if capture.adjoint.note)])
    return gradient, found, tuple(said)


def _numbered(captures: Sequence[Capture]) -> tuple[Capture, ...]:
    """With the number of the call in the name of a DEQ that is called more than once; the last comes first."""
    total = Counter(capture.deq for capture in captures)
    left, numbered = Counter(total), []
    for capture in captures:
        name = capture.deq
        if total[name] > 1:
            capture = replace(capture, deq=f"{name} (call {left[name]} of {total[name]})".strip())
            left[name] -= 1
        numbered.append(capture)
    return tuple(numbered)


def exact_adjoint(equilibrium: Equilibrium, tol: float | None = None, max_iter: int = REFERENCE_STEPS) -> Adjoint:
    """The exact adjoint as well as it can be had: it is said how, and never raised.

    Args:
        equilibrium: A free equilibrium.
        tol: Relative residual at which implicit differentiation stops; by default 10 times the rounding error.
        max_iter: Largest number of its products with `J^T`.

    Returns:
        The vector, its residual, and why it is not exact.

    Example:
        >>> matrix, ones = torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.ones(2)
        >>> exact_adjoint(Equilibrium(lambda z: matrix @ z, torch.zeros(2), torch.zeros(2), ones, 1e-7)).vector
        tensor([1.0000, 1.5000], dtype=torch.float64)
        >>> free = Equilibrium(lambda z: z + 0 * z**2, torch.zeros(2), torch.zeros(2), torch.ones(2), 1e-7)
        >>> found = exact_adjoint(free)  # I - J is zero
        >>> found.method, found.residual, found.note[:34]
        ('least squares', 1.0, 'NonFiniteError: I - J is singular ')
    """
    if equilibrium.cotangent_size == 0.0:
        return Adjoint(torch.zeros_like(equilibrium.z, dtype=torch.float64), "zero", 0.0, "the cotangent is zero")
    try:
        equilibrium.require_finite()
        if equilibrium.z.numel() <= LARGEST_DENSE:
            return _dense(equilibrium)
        mode = ImplicitDifferentiation(max_iter=max_iter, tol=tol or 10 * equilibrium.eps, on_divergence="accept")
        vector, report = mode.solve(equilibrium.afresh())
    except Exception as error:  # the others' figures do not depend on it
        nothing = torch.full_like(equilibrium.z, torch.nan, dtype=torch.float64)
        return Adjoint(nothing, "none", torch.nan, short(error))
    return Adjoint(vector.double(), "ift", report.residual)


def _dense(equilibrium: Equilibrium) -> Adjoint:
    matrix, force = _system(equilibrium)
    try:
        vector, method, note = _solved(matrix, force), "dense", ""
    except NonFiniteError as error:
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError("the Jacobian at the fixed point is not finite.") from error
        vector, method, note = _least_squares(matrix, force), "least squares", short(error)
    residual = relative_difference(matrix @ vector, force)
    return Adjoint(vector.reshape(equilibrium.z.shape), method, residual, note)


def _least_squares(matrix: Tensor, force: Tensor) -> Tensor:
    """By normal equations, damped by a millionth: LAPACK's drivers take a minute, or are wrong at random ("gelsy")."""
    normal = matrix.T @ matrix
    normal.diagonal().add_(1e-12 * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
    estimate: Tensor = torch.linalg.solve_ex(normal, matrix.T @ force)[0]
    return estimate


def _system(equilibrium: Equilibrium) -> tuple[Tensor, Tensor]:
    """`I - J^T` and `g`: the Jacobian in the dtype of the state, the linear system in float64."""
    matrix = dense_jacobian(equilibrium.f, equilibrium.z).double().neg_().T
    matrix.diagonal().add_(1.0)
    return matrix, equilibrium.cotangent.double().flatten()


def _solved(matrix: Tensor, force: Tensor) -> Tensor:
    solution, status = torch.linalg.solve_ex(matrix, force)
    if int(status) != 0 or not bool(torch.isfinite(solution).all()):
        raise NonFiniteError(
            "I - J is singular at the fixed point, so no exact gradient exists. Look for a direction that f passes on "
            "unchanged, such as a residual connection without a final norm."
        )
    vector: Tensor = solution
    return vector


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
