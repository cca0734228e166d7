"""Relaxation by the solver of one's choice: the loop of this package, or one that is registered with torchdeq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.relaxation.driven import Solver, drive
from torchdeq_ep.relaxation.loop import FindRows, Relaxation, Step, iterate
from torchdeq_ep.relaxation.phases import Enough
from torchdeq_ep.state import in_the_middle, norm

Product = Callable[[Tensor], Tensor]
"""A linear map of one vector."""
Run = Callable[..., Relaxation]
"""`relax` with its options: what is left to give is the map, the first guess and the scale."""

OWN_SOLVERS: dict[str, int | None] = {"auto": None, "plain": 1}
"""Names of the package's own loop, and how many values each may combine."""

GMRES = "gmres"
"""Name of the solver of linear equations, which has no part in the loop."""

_ORDINARY = 1e10
"""Forces up to this size, and down to its inverse, are taken as they are."""


def relax(
    step: Step,
    start: Tensor,
    *,
    scale: float,
    tol: float,
    max_iter: int,
    floor: float = 0.0,
    solver: str | Solver | None = None,
    rows: FindRows | None = None,
    enough: Enough | None = None,
) -> Relaxation:
    """Solve `z = step(z)` for a stack of nodes.

    Args:
        step: The map, `(K, *shape) -> (K, *shape)`, real or complex.
        start: First guess, of the same shape.
        scale: What residuals are relative to: the norm of the term of the map that does not depend on the state.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        solver: `None` or `"auto"` for [`iterate`][torchdeq_ep.relaxation.iterate]; `"plain"` for the same without
            acceleration; the name of a solver registered with torchdeq, or a callable of the same signature.
        rows: As for [`iterate`][torchdeq_ep.relaxation.iterate].
        enough: Likewise.

    Returns:
        The result, converged or not.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> import torch
        >>> result = relax(lambda z: 0.5 * z + 1, torch.zeros(1, 2), scale=1.0, tol=1e-6, max_iter=50)
        >>> result.value.round(decimals=3)
        tensor([[2., 2.]])
    """
    # Solvers are given pairs of reals: torchdeq's transpose without conjugation, ours takes real inner products.
    real_step, real_start = step, start
    if start.is_complex():
        real_start = torch.view_as_real(start)

        def real_step(z: Tensor) -> Tensor:
            return torch.view_as_real(step(torch.view_as_complex(z)))

    solver = check_solver(solver)
    if isinstance(solver, str):
        memory = OWN_SOLVERS[solver]
        result = iterate(
            real_step,
            real_start,
            scale=scale,
            tol=tol,
            max_iter=max_iter,
            floor=floor,
            memory=memory,
            rows=rows,
            enough=enough,
        )
    else:
        result = drive(solver, real_step, real_start, scale=scale, tol=tol, max_iter=max_iter)
    return replace(result, value=torch.view_as_complex(result.value)) if start.is_complex() else result


def relax_linear(run: Run, product: Product, force: Tensor, enough: Enough | None = None) -> Relaxation:
    """Solve `v = product(v) + force`, as a stack of one, in single precision at least.

    Args:
        run: [`relax`][torchdeq_ep.relaxation.relax] with its options.
        product: A linear map of one vector, in the dtype of the force.
        force: The term that does not depend on `v`.
        enough: As for [`relax`][torchdeq_ep.relaxation.relax].

    Returns:
        The result; its value is a stack of one.

    Example:
        >>> from functools import partial
        >>> run = partial(relax, tol=1e-6, max_iter=50)
        >>> relax_linear(run, lambda v: 0.5 * v, torch.ones(2)).value.round(decimals=3)
        tensor([[2., 2.]])
    """
    wide = force.to(torch.promote_types(force.dtype, torch.float32))  # squares of float16 underflow
    size = norm(wide)
    if not 1 / _ORDINARY < size < _ORDINARY:
        scaled, factor = in_the_middle(wide)  # inner products of residuals leave the range long before they do
        if factor != 1:
            inner = None if enough is None else in_units(enough, factor)
            found = relax_linear(run, lambda v: product(v.to(force.dtype)).to(v.dtype), scaled, inner)
            return replace(found, value=found.value * factor)

    def step(v: Tensor) -> Tensor:
        return (product(v[0].to(force.dtype)) + wide).unsqueeze(0)

    relaxation = run(step, wide.unsqueeze(0), scale=size, enough=enough)
    return relaxation.after(norm(relaxation.value), size)


def in_units(enough: Enough, unit: float) -> Enough:
    """Which rows are left, by points and residuals that are given as multiples of a unit."""
    return lambda points, norms: enough(points * unit, norms * unit)


def check_solver(solver: str | Solver | None, linear: bool = False) -> str | Solver:
    """What a choice of solver stands for.

    Args:
        solver: As for [`relax`][torchdeq_ep.relaxation.relax].
        linear: Whether it is to solve a linear equation, which `"gmres"` does too.

    Returns:
        `"auto"`, `"plain"` or `"gmres"` for the package's own, and the solver itself otherwise.

    Raises:
        InvalidOptionError: If no solver of that name is registered, or it is for linear equations and this is none.

    Example:
        >>> check_solver(None), check_solver("plain"), check_solver("anderson").__name__
        ('auto', 'plain', 'anderson_solver')
    """
    if solver is None:
        return "auto"
    if solver == GMRES and not linear:
        raise InvalidOptionError(
            f"solver={GMRES!r} is for modes whose equation is linear ('ift', 'ep-infinitesimal'): a finite nudge "
            "moves the state along f itself. Leave solver out, or take 'anderson' or 'broyden'."
        )
    return solver if isinstance(solver, str) and solver in (*OWN_SOLVERS, GMRES) else find_solver(solver)


def find_solver(solver: str | Solver) -> Solver:
    """The solver of that name in torchdeq's registry; a callable is returned as it is.

    Args:
        solver: A name given to `torchdeq.solver.register_solver`, or a callable of the same signature.

    Returns:
        The solver.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> find_solver("anderson").__name__
        'anderson_solver'
    """
    if callable(solver):
        return solver
    from torchdeq.solver import _solvers

    if solver not in _solvers:
        raise InvalidOptionError(unknown_name("solver", solver, {**OWN_SOLVERS, GMRES: None, **_solvers}))
    found: Solver = _solvers[solver]
    return found
