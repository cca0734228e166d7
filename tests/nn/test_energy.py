"""Maps that descend an energy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.nn import EnergyMap


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


class Energy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.couplings = torch.nn.Parameter(0.1 * torch.randn(5, 5))

    def forward(self, z: Tensor) -> Tensor:
        return (z**4 / 4 + z**2 / 2).sum(-1) + ((z @ self.couplings) * z).sum(-1) + z.sum(-1)


def test_energy_map_descends_with_a_symmetric_jacobian_under_every_transform() -> None:
    energy = Energy()
    f, z = EnergyMap(energy, step=0.2), torch.randn(2, 5)
    couplings = energy.couplings + energy.couplings.T
    torch.testing.assert_close(f(z), z - 0.2 * (z**3 + z + z @ couplings + 1))
    jacobian = dense_jacobian(f, z)
    torch.testing.assert_close(jacobian, jacobian.T)
    u = torch.randn_like(z)
    torch.testing.assert_close(torch.func.jvp(f, (z,), (u,))[1], (jacobian @ u.flatten()).reshape(2, 5))
    torch.testing.assert_close(torch.vmap(f)(torch.stack([z, u])), torch.stack([f(z), f(u)]))


def test_energy_map_at_complex_states_is_the_holomorphic_one() -> None:
    f = EnergyMap(lambda z: (z**4).sum() / 4, step=0.5)
    z = torch.randn(3, dtype=torch.complex128)
    torch.testing.assert_close(f(z), z - 0.5 * z**3)


def test_ep_of_an_energy_map_is_exact_and_reaches_its_parameters() -> None:
    energy = Energy()
    f, z = EnergyMap(energy, step=0.2), torch.zeros(2, 5)
    with torch.no_grad():
        for _ in range(300):
            z = f(z)
    gradients = []
    for backward in ("ift", "ep-richardson"):
        tep.attach(f, z, backward).square().sum().backward()
        gradients.append(energy.couplings.grad.clone())  # type: ignore[union-attr]
        energy.couplings.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_energy_map_refuses_a_step_that_is_not_positive() -> None:
    with pytest.raises(tep.errors.InvalidOptionError, match="step"):
        EnergyMap(lambda z: z.sum(), step=0.0)
