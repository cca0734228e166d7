"""What callbacks have to know of the trainer, of the module, and of its DEQs."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import EquilibriumRule
from torchdeq_ep_lightning.flavour import Trainer


def loss_scale(trainer: Trainer) -> float:
    """The factor between the loss that `training_step` returns and the one that is differentiated.

    Lightning divides by the number of accumulated batches, and multiplies by the scale of a GradScaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches


def named(module: nn.Module, path: str | None) -> Any:
    """The attribute of a module at a dotted path, `None` for no path.

    Args:
        module: Where the path starts.
        path: For instance `"network.metric"`.

    Returns:
        The attribute.

    Raises:
        InvalidOptionError: If there is none.
    """
    found: Any = module
    for part in path.split(".") if path else ():
        if not hasattr(found, part):
            raise InvalidOptionError(f"{type(module).__name__} has no attribute {path!r}: there is no {part!r} in it.")
        found = getattr(found, part)
    return found if path else None


def rule_of(deq: nn.Module) -> EquilibriumRule | None:
    """The backward pass of this package that a DEQ trains with, `None` where it is torchdeq's own.

    Args:
        deq: A DEQ of torchdeq.

    Returns:
        The rule that is in force.
    """
    rule = cast(Any, deq).produce_grad[-1]
    return rule if isinstance(rule, EquilibriumRule) else None
