"""Random physical networks, many of them with several equilibria, and circuits of any size."""

import pytest
import torch

import torchdeq_ep_physics as physics

needs_ngspice = pytest.mark.skipif(not physics.ngspice_available(), reason="ngspice is not installed")


def random_network(kind, seed):
    """A network and three inputs: gains from weak to glassy, cues from strong to none, with and without pinning."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    n, rows = int(torch.randint(4, 24, (1,), generator=generator)), 3
    gain, weakness = 10 ** float(2 * uniform(1) - 1), 0.1 ** float(3 * uniform(1))
    if kind == "hopfield":
        network = physics.HopfieldNetwork(gain * normal(n, n) / n**0.5, 0.5 + uniform(n))
        return network, gain * weakness * normal(rows, n)
    pinning = torch.zeros(n, 2) if seed % 3 == 0 else weakness * uniform(n, 2)
    if kind == "xy":
        return physics.OscillatorNetwork(gain * normal(n, n) / n**0.5, pinning), 3 * normal(rows, 2)
    coupling = gain * (1.0 + normal(n, n)) / n**0.5
    frequency = 0.3 * normal(n)
    lag = 0.3 if kind == "lag" else 0.0
    return physics.OscillatorNetwork(coupling, pinning, frequency, lag=lag), 3 * normal(rows, 2)


def grid(side, diodes=True):
    """A square grid of resistors, driven at its corners, every seventh node leaking to ground; and its input."""
    generator = torch.Generator().manual_seed(0)
    n = side * side
    ground = n + 4
    resistors = [(k, k + 1) for k in range(n) if (k + 1) % side] + [(k, k + side) for k in range(n - side)]
    resistors += [(corner, n + k) for k, corner in enumerate((0, side - 1, n - side, n - 1))]
    resistors += [(k, ground) for k in range(0, n, 7)]
    conductance = 1e-3 * torch.exp(0.5 * torch.randn(len(resistors), generator=generator, dtype=torch.float64))
    branches = [(k, ground) for k in range(0, n, 3)] + [(ground, k) for k in range(1, n, 3)] if diodes else []
    network = physics.ResistiveNetwork(n, 4, resistors, conductance, diodes=branches)
    return network, 10 * torch.randn(1, 4, generator=generator, dtype=torch.float64)
