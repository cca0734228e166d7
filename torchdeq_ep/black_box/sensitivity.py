"""How the equilibrium of a black box follows its parameters: forward derivatives, which no symmetry is needed for.

With `F(z*, theta, x) = 0` and `K = -dF/dz`, a change `dtheta` moves the equilibrium by

    dz* = K^-1 (dF/dtheta) dtheta,

and a nudge by a force `h` by `b K^-1 h`. So the system is pushed by what the change of its parameters would push, and
one looks where it goes: exact to the order of the stencil, whether or not the system is reciprocal.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep.black_box.containers import kept, of_other_tensors, tensors_of
from torchdeq_ep.black_box.instrument import Instrument, Solve
from torchdeq_ep.black_box.report import student_quantile
from torchdeq_ep.black_box.system import ForceLaw, System, require_shape
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.modes import ForceScale, Stencil


@dataclass(frozen=True)
class Sensitivities:
    """Derivatives of an equilibrium by its parameters, as they were measured.

    Args:
        state: The free state.
        columns: `dz*/dtheta` along each tangent: `(K, *shape)`.
        standard_error: Of each entry, or `None` without repeats.
        degrees_of_freedom: Of the standard errors, by Welch and Satterthwaite; NaN without repeats.
        calls: Solves asked for.
        failures: Solves that failed and were repeated.

    Example:
        >>> found = Sensitivities(torch.ones(1), torch.ones(2, 1), torch.full((2, 1), 0.1), 6.0, 9, 0)
        >>> found.interval()[0]
        tensor([0.2447])
    """

    state: Tensor
    columns: Tensor
    standard_error: Tensor | None
    degrees_of_freedom: float
    calls: int
    failures: int

    def interval(self, level: float = 0.95) -> Tensor:
        """Half widths of the confidence intervals, by Student's distribution.

        Args:
            level: Probability that an interval holds the value that a noiseless solver would give.

        Returns:
            A tensor of the shape of the columns.

        Raises:
            InvalidOptionError: If the level is not between 0 and 1, or nothing was repeated.
        """
        if not 0 < level < 1:
            raise InvalidOptionError(f"level must lie between 0 and 1, not be {level!r}.")
        if self.standard_error is None:
            raise InvalidOptionError("there is no interval without a standard error: use repeats=2 or more.")
        return student_quantile(0.5 + level / 2, self.degrees_of_freedom) * self.standard_error


def sensitivities(
    solve: Solve,
    force: ForceLaw,
    theta: Any,
    x: Any = None,
    *,
    columns: Sequence[Any] | None = None,
    stencil: Stencil | str = "symmetric",
    scale: ForceScale | Literal["response"] = "relative",
    shape: Sequence[int] | None = None,
    repeats: int = 1,
    noise: float | None = None,
    batched: bool = True,
    timeout: float | None = None,
    retries: int = 0,
    executor: Literal["thread", "process"] | Executor | None = None,
    workers: int | None = None,
    check: bool = True,
) -> Sensitivities:
    """Measure `dz*/dtheta` of a black box, column by column. The system need not be reciprocal.

    The nudged phases of all columns are solved together, so `executor` makes them concurrent.

    Args:
        solve: As for [`attach_equilibrium`][torchdeq_ep.attach_equilibrium].
        force: Likewise; differentiated by `theta` at the free state only.
        theta: Likewise.
        x: Likewise.
        columns: Along which changes of `theta`: numbers of entries, counted through all its tensors in order, or whole
            changes in the form of `theta` (for a module a list of tensors, one for each of its own). By default every
            entry.
        stencil: As for `attach_equilibrium`, like all that follows.
        scale: See there. `"response"` finds an amplitude for each column.
        shape: See there.
        repeats: See there.
        noise: See there.
        batched: See there.
        timeout: See there.
        retries: See there.
        executor: See there.
        workers: See there.
        check: Whether the law is tested at the free and the nudged states.

    Returns:
        The columns, with standard errors if there are repeats.

    Raises:
        InvalidOptionError: If an option or a column is not acceptable.
        SolverError: If the solver fails more often than `retries` allows.
        MapContractError: If `force` does not return the shape of the state.
        LawMismatchError: If `force` is not the law of the system.
        NonFiniteError: If the derivative of the force is not finite.

    Example:
        >>> gain = torch.tensor([2.0, 3.0], dtype=torch.float64)
        >>> def force(z, gain, x):  # the first entry drives the second, and nothing drives the first
        ...     return torch.stack([1 - gain[0] * z[0], gain[1] * z[0] - z[1]])
        >>> def solve(current):
        ...     first = (1 + current.expand(2)[0]) / gain[0]
        ...     return torch.stack([first, gain[1] * first + current.expand(2)[1]])
        >>> sensitivities(solve, force, gain).columns
        tensor([[-0.2500, -0.7500],
                [ 0.0000,  0.5000]], dtype=torch.float64)
    """
    instrument = Instrument(solve, batched, timeout, retries, executor, workers)
    theta, x = kept(theta, "theta"), kept(x, "x")
    system = System(instrument, force, theta, x, stencil, scale, None, repeats, noise, check, None)
    free = system.free_phase(None if shape is None else torch.Size(shape))
    rest = torch.stack(free.states).mean(0)
    pushes = _pushes(system.force, rest.to(system.like), system.theta, system.x, columns)
    responses, nudged = system.tangents(free, pushes)
    zeros = torch.zeros_like(rest)
    found = [(zeros, zeros) if each is None else (each.displacement, each.standard_error) for each in responses]
    moved = [each for each in responses if each is not None]
    errors = [error for _, error in found if error is not None]
    return Sensitivities(
        rest.to(system.like),
        torch.stack([column for column, _ in found]).to(system.like),
        torch.stack(errors).to(system.like) if repeats > 1 else None,
        moved[0].degrees_of_freedom if moved else float("nan"),
        len(free.states) + nudged.calls,
        free.failures + nudged.failures,
    )


def _pushes(force: ForceLaw, state: Tensor, theta: Any, x: Any, columns: Sequence[Any] | None) -> list[Tensor]:
    """`(dF/dtheta) dtheta` for each column: the derivative of a VJP by its vector, which takes any container."""
    other = of_other_tensors(theta, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
    leaves = [tensor for tensor in tensors_of(other) if tensor.requires_grad]
    tangents = _tangents(leaves, columns)
    with torch.enable_grad():
        value = force(state, other, x)
        require_shape(value, state)
        if not value.requires_grad:
            return [torch.zeros_like(state)] * len(tangents)
        vector = torch.zeros_like(value, requires_grad=True)
        pulled = torch.autograd.grad(
            value, leaves, vector, create_graph=True, allow_unused=True, materialize_grads=True
        )
    followed = [k for k, each in enumerate(pulled) if each.requires_grad]
    pushes = []
    for tangent in tangents:
        (push,) = torch.autograd.grad(
            [pulled[k] for k in followed], vector, [tangent[k] for k in followed], retain_graph=True
        )
        pushes.append(push)
    return pushes


def _tangents(leaves: Sequence[Tensor], columns: Sequence[Any] | None) -> list[list[Tensor]]:
    total = sum(leaf.numel() for leaf in leaves)
    if not total:
        raise InvalidOptionError("theta has no tensor of floating-point numbers to change.")
    tangents = []
    for column in range(total) if columns is None else columns:
        if isinstance(column, int):
            if not 0 <= column < total:
                raise InvalidOptionError(f"columns has entry {column}, but theta has entries 0 to {total - 1}.")
            flat = torch.zeros(total, dtype=leaves[0].dtype, device=leaves[0].device)
            flat[column] = 1.0
            parts = torch.split(flat, [leaf.numel() for leaf in leaves])
            tangents.append([part.to(leaf).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
            continue
        change = tensors_of(column)
        if [tuple(t.shape) for t in change] != [tuple(leaf.shape) for leaf in leaves]:
            raise InvalidOptionError(
                "a column must be the number of an entry, or a change of theta of its form: tensors of shapes "
                f"{[tuple(leaf.shape) for leaf in leaves]}, not {[tuple(t.shape) for t in change]}."
            )
        tangents.append([t.detach().to(leaf) for t, leaf in zip(change, leaves, strict=True)])
    if not tangents:
        raise InvalidOptionError("columns is empty: give numbers of entries, changes of theta, or None for all.")
    return tangents
