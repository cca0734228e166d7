"""SHINE: the inverse that the forward solver estimated, shared with the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError
from torchdeq_ep.jacobian import vjp
from torchdeq_ep.modes.base import Mode
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.relaxation.inverse import InverseEstimate, broyden
from torchdeq_ep.relaxation.kept import Need
from torchdeq_ep.state import Equilibrium


@dataclass(frozen=True)
class Shine(Mode):
    """`v = H^T g`, where `H` is the estimate of `(I - J)^-1` that Broyden's method left in the forward pass.

    It takes no product with the Jacobian (Ramzi et al. 2022, "SHINE", arXiv 2106.00553). torchdeq's Broyden solver
    throws its estimate away, so the forward solver must be `"broyden-inverse"`.

    Args:
        refine: Steps of Broyden's method on `v = J^T v + g`, from `H^T g` with `H^T` for its first inverse; each
            takes a product with `J^T`. The paper's refined SHINE.
        fallback: Samples whose `|H^T g|` is more than this times `|g|` get `g`, the one-step gradient, instead; the
            paper uses 1.3. `None` for never.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torchdeq, torchdeq_ep as tep
        >>> deq, weight = torchdeq.get_deq(f_solver="broyden-inverse"), torch.nn.Parameter(torch.tensor(0.5))
        >>> with tep.use_backward(deq, "shine"):
        ...     (z,), info = deq(lambda z: weight * z + 1, torch.zeros(1, 1))
        >>> z.sum().backward()
        >>> weight.grad  # z* = 1 / (1 - w), so that dz*/dw = 4 at a half
        tensor(4.)
    """

    refine: int = 0
    fallback: float | None = None

    def __post_init__(self) -> None:
        check_count("refine", self.refine, 0)
        if self.fallback is not None and not (isinstance(self.fallback, (int, float)) and self.fallback >= 1):
            raise InvalidOptionError(f"fallback must be a ratio of at least 1, or None, not {self.fallback!r}.")

    @property
    def needs(self) -> Need | None:
        return "inverse"

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        inverse = equilibrium.history
        if not isinstance(inverse, InverseEstimate):
            raise MissingHistoryError(
                "'shine' needs the inverse that the forward solver estimated: choose torchdeq.get_deq("
                "f_solver='broyden-inverse') with tep.use_backward, or tep.loop(..., solver='broyden-inverse')."
            )
        g = _rows(equilibrium, equilibrium.cotangent, inverse.count)
        v = inverse.transposed.apply(g)
        if self.fallback is not None:
            too_long = torch.linalg.vector_norm(v, dim=1) > self.fallback * torch.linalg.vector_norm(g, dim=1)
            v = torch.where(too_long.unsqueeze(1), g, v)
        if self.refine:
            product = vjp(equilibrium.f, equilibrium.z)

            def residual(rows: Tensor) -> Tensor:
                pulled = product(_state(equilibrium, rows, inverse.count))
                return rows - _rows(equilibrium, pulled, inverse.count) - g

            v = broyden(residual, v, inverse.transposed, self.refine + 1).state
        calls = self.refine + 2 if self.refine else 0
        return _state(equilibrium, v, inverse.count), NudgeReport(repr(self), calls=calls, iterations=self.refine)


def _rows(equilibrium: Equilibrium, packed: Tensor, count: int) -> Tensor:
    """A packed vector in the rows of the solver: those of samples where it solved samples side by side."""
    if packed.dim() > 1 or count == 1:
        return packed.reshape(count, -1)
    assert equilibrium.rows is not None
    return equilibrium.rows.split(packed.unsqueeze(0))


def _state(equilibrium: Equilibrium, rows: Tensor, count: int) -> Tensor:
    like = equilibrium.z
    if like.dim() > 1 or count == 1:
        return rows.reshape(like.shape)
    assert equilibrium.rows is not None
    return equilibrium.rows.join(rows, like.unsqueeze(0))[0]
