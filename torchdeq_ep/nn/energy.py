"""Gradient descent on an energy as a map, whose Jacobian is symmetric by construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError

Energy = Callable[[Tensor], Tensor]


class EnergyMap(nn.Module):
    """`f(z) = z - step * dE/dz`. Its Jacobian is `I - step * H` with the Hessian `H`, so no nudge of it is biased.

    It can be evaluated under `torch.vmap`, in forward mode, and at complex states if the energy allows it; gradients
    reach whatever the energy depends on.

    Args:
        energy: The energy as a function of the state, of any shape: a tensor of no, one or more dimensions is summed.
            The parameters of a module become those of the map.
        step: Step size, positive. The iteration converges to a minimum if it is below `2 / max eigenvalue of H`.

    Raises:
        InvalidOptionError: If the step is not positive.

    Example:
        >>> f = EnergyMap(lambda z: 0.5 * z**2, step=0.25)
        >>> f(torch.tensor([4.0, 8.0]))
        tensor([3., 6.])
    """

    def __init__(self, energy: Energy, step: float) -> None:
        super().__init__()
        if not step > 0:
            raise InvalidOptionError(f"step of an EnergyMap must be positive, not {step!r}.")
        self.energy = energy
        self.step = step

    def forward(self, z: Tensor) -> Tensor:
        linearised = torch.func.vjp(self.energy, z)
        (gradient,) = linearised[1](torch.ones_like(linearised[0]))
        # PyTorch's gradient of a holomorphic function is the conjugate of its derivative.
        descent: Tensor = z - self.step * (gradient.conj() if gradient.is_complex() else gradient)
        return descent

    def extra_repr(self) -> str:
        return f"step={self.step}"
