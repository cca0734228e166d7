"""Why is an EP gradient off? Its error, split into the three causes it can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.measuring.capture import capture_all, deqs_in, trying
from torchdeq_ep.measuring.diagnosis import Diagnosis
from torchdeq_ep.measuring.progress import OnProgress, Steps
from torchdeq_ep.measuring.splitting import LARGE, STEPS, Examination
from torchdeq_ep.modes import EquilibriumPropagation, ModeLike, get_backward


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor],
    backward: str | ModeLike = "ep",
    *,
    on_progress: OnProgress | None = None,
) -> Diagnosis:
    """Split the error of an EP gradient into its causes, and say what to do about the largest.

    With `z**` the fixed point solved further, the estimate `v` of the mode differs from the exact adjoint by

        (v - v_tight) + (v_tight - v_limit) + (v_limit - v_exact)

    which are called *convergence*, *finite nudge* and *asymmetry*: `v_tight` is the same mode at `z**`, solved further,
    `v_limit` its limit for a vanishing nudge, and `v_exact` solves `v = J^T v + g`. "Further" means to rounding error
    in up to 1000 steps, and for states of more than 4096 entries to a residual of 0.0001 in up to 200 steps. Each of
    these may fail or not converge: it is then `NaN` or `None`, and a note says why.

    Args:
        model: A module with at least one torchdeq DEQ; left as it was found.
        batch: As for [`compare`][torchdeq_ep.measuring.compare].
        loss_fn: As for `compare`.
        backward: A mode of equilibrium propagation, or the spec of one.
        on_progress: Called as `on_progress(what, done, total)` before each step of the work and at its end. By default
            a notebook shows a bar, and nothing else does.

    Returns:
        The diagnosis.

    Raises:
        InvalidOptionError: If `backward` is not a mode of equilibrium propagation, or the loss reaches no DEQ.
        NoDEQError: If there is no DEQ in the model.

    Example:
        >>> import torch, torchdeq
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.deq, self.linear = torchdeq.get_deq(f_tol=1e-6), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]
        >>> _ = torch.manual_seed(0)
        >>> batch = torch.randn(2, 4), torch.randn(2, 4)
        >>> print(diagnose(Model(), batch, torch.nn.functional.mse_loss).layers[0].advice[:56])
        Most of the error is the asymmetry of the Jacobian, whic
    """
    mode = get_backward(backward)
    if not isinstance(mode, EquilibriumPropagation):
        raise InvalidOptionError(f"only modes of equilibrium propagation have these errors to diagnose, not {mode!r}.")
    deqs = deqs_in(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with trying(model, batch, loss_fn, list(trained.values())) as trial:
        tell = Steps(on_progress, 1 + max(len(deqs), 1) * STEPS)
        tell("the equilibria")
        captures = capture_all(trial, LARGE.tol, LARGE.steps)[1]
        tell.total = 1 + len(captures) * STEPS
        layers = [Examination(capture, mode, trained, tell).diagnosis() for capture in captures]
        tell.end()
    return Diagnosis(repr(mode), tuple(layers))
