"""Switching the backward of deepinv's deep-equilibrium models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_deepinv.metrics import proximal_metric

PROXIMAL = "proximal"
_METHOD = "DEQ_additional_step"


class DeepinvHandle:
    """Undoes a switch, at the end of a `with` or on demand.

    Args:
        switched: The models, each with what had the name of its last step before, if it was the instance's own.
    """

    def __init__(self, switched: list[tuple[nn.Module, Any]]) -> None:
        self._switched = switched
        self.last: dict[str, tep.NudgeReport] = {}
        """The report of the last backward pass of each model, by its number."""

    def remove(self) -> None:
        """Give every model the backward back that it had; a second call does nothing."""
        for model, before in self._switched:
            model.__dict__.pop(_METHOD, None)
            if before is not None:
                model.__dict__[_METHOD] = before
        self._switched = []

    def __enter__(self) -> DeepinvHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def record(self, name: str, report: tep.NudgeReport) -> None:
        """Keep a report.

        Args:
            name: Of the model.
            report: Of its backward pass.
        """
        self.last[name] = report


def adapt(module: nn.Module, backward: Any = "ep", **options: Any) -> DeepinvHandle | None:
    """Switch every deepinv optimiser with `DEQ=True` inside a module; what `torchdeq_ep.use_backward` calls.

    The forward pass stays as it is, value for value. A model with `jacobian_free=True` is switched as well.

    Args:
        module: A model.
        backward: Name or spec of a mode, or a mode.
        **options: Of the mode. `metric="proximal"` is the operator metric of the data step, see
            [`proximal_metric`][torchdeq_ep_deepinv.proximal_metric].

    Returns:
        A handle, or `None` if there is no such model inside.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If the mode has no such option.
    """
    models = [part for part in module.modules() if getattr(part, "DEQ", False) and hasattr(part, _METHOD)]
    if not models:
        return None
    is_proximal = options.get("metric") == PROXIMAL
    given = {name: value for name, value in options.items() if not (name == "metric" and is_proximal)}
    mode = tep.get_backward(backward, **given)
    if is_proximal and not hasattr(mode, "metric"):
        raise InvalidOptionError(f"{backward!r} takes no metric: only modes of equilibrium propagation do.")
    handle = DeepinvHandle([(model, model.__dict__.get(_METHOD)) for model in models])
    for number, model in enumerate(models):
        writer = partial(handle.record, str(number))
        model.__dict__[_METHOD] = partial(_last_step, model, mode, is_proximal, writer)
    return handle


def _last_step(
    model: Any,
    mode: Any,
    is_proximal: bool,
    writer: Any,
    state: dict[str, Any],
    y: Tensor,
    physics: Any,
    **options: Any,
) -> Tensor:
    """One more step at the equilibrium, whose value deepinv returns, with the gradient of the mode."""
    last = model.max_iter - 1
    fidelity, prior, parameters = (
        update(last) if update else None
        for update in (model.update_data_fidelity_fn, model.update_prior_fn, model.update_params_fn)
    )
    iterator = model.fixed_point.iterator

    def step(z: Tensor) -> Tensor:
        value: Tensor = iterator({"est": (z,)}, fidelity, prior, parameters, y, physics, **options)["est"][0]
        return value

    with torch.no_grad():
        z = step(state["est"][0])
    if is_proximal:
        mode = tep.get_backward(mode, metric=proximal_metric(iterator, parameters, physics))
    return tep.attach(step, z, mode, writer=writer)
