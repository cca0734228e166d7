"""Maps whose input injection is computed once, not in every step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class InjectOnce(nn.Module):
    """A map `f(z) = step(z, inject(x))`, with `inject(x)` computed once for each input `x`.

    A nudged phase calls `f` ten to a hundred times. What depends on the input alone (the first convolution, an
    embedding, keys and values of a memory) need not be in it.

    Args:
        inject: A module of the input.
        step: A module of the state and of what `inject` returned.

    Example:
        >>> import torch, torchdeq
        >>> class Step(torch.nn.Module):
        ...     def forward(self, z, drive):
        ...         return 0.5 * torch.tanh(z) + drive
        >>> maps = InjectOnce(torch.nn.Linear(4, 3), Step())
        >>> f = maps(torch.zeros(2, 4))
        >>> states, info = torchdeq.get_deq()(f, torch.zeros(2, 3))
        >>> states[-1].shape
        torch.Size([2, 3])
    """

    def __init__(self, inject: nn.Module, step: nn.Module) -> None:
        super().__init__()
        self.inject, self.step = inject, step

    def forward(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The map for one input.

        Args:
            x: What `inject` takes.

        Returns:
            `f(z)`, to be given to a DEQ or to [`attach`][torchdeq_ep.node.attach].
        """
        drive = self.inject(x)

        def f(z: Tensor) -> Tensor:
            value: Tensor = self.step(z, drive)
            return value

        return f
