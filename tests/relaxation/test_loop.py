"""The loop of the package: it accelerates where that pays, and ends where nothing more is to be had."""

import math

import pytest
import torch
from problems import Affine
from torch.utils._python_dispatch import TorchDispatchMode

from torchdeq_ep.measuring.comparison import peak_memory
from torchdeq_ep.relaxation.loop import MEMORY, iterate
from torchdeq_ep.state import Rows


def test_points_that_the_map_was_given_are_not_written_over():
    step, given = Affine(0.95), []

    def watched(z):
        given.append((z, z.clone()))
        return step(z)

    iterate(watched, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=200)
    assert all(torch.equal(z, copy) for z, copy in given)


@pytest.mark.parametrize(("gain", "tol", "history"), [(0.5, 1e-3, False), (0.99, 1e-6, True)])
def test_a_history_is_kept_only_where_the_fixed_point_is_far(gain, tol, history):
    diagonal, offset = gain * torch.linspace(-1, 1, 4000), torch.randn(1, 4000)

    def states(memory):
        def run():
            scale = float(offset.norm())
            iterate(lambda z: diagonal * z + offset, torch.zeros_like(offset), scale=scale, tol=tol, memory=memory)

        return peak_memory(run, torch.device("cpu")) / (4 * offset.numel())

    assert (states(MEMORY) - states(1) > 2 * MEMORY - 3) == history


def test_acceleration_pays_when_plain_iteration_is_slow():
    step = Affine(0.0)
    step.matrix = torch.diag(torch.linspace(-0.95, 0.95, 20, dtype=torch.float64))
    fast = iterate(step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=5000)
    assert fast.residual <= 1e-8
    assert len(fast.trace) < 0.5 * math.log(1e-8) / math.log(0.95)


def test_acceleration_reaches_fixed_points_of_expanding_maps():
    step = Affine(0.0)
    step.matrix = torch.diag(torch.linspace(-1.5, 0.5, 20, dtype=torch.float64))
    result = iterate(step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=200)
    assert result.residual <= 1e-8


@pytest.mark.parametrize("seed", [2, 3, 5, 7, 8, 11])
def test_where_acceleration_stalls_the_map_itself_goes_on(seed):
    # Symmetric weights of norm 1.6: plain damped iteration descends, past states that are almost fixed points. There
    # mixing alone stays for ever.
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    weight = weight + weight.T
    weight *= 1.6 / torch.linalg.matrix_norm(weight, 2)
    drive = 0.5 * torch.randn(8, 64, generator=generator, dtype=torch.float64)

    def step(z):
        return 0.5 * z + 0.5 * torch.tanh(z @ weight.T + drive)

    plain, accelerated = (
        iterate(step, torch.zeros_like(drive), scale=10.0, tol=1e-6, max_iter=2000, memory=memory)
        for memory in (1, MEMORY)
    )
    assert plain.residual <= 1e-6
    assert accelerated.residual <= 1e-6
    assert accelerated.steps <= 2 * plain.steps


def test_stalling_at_the_rounding_floor_ends_the_loop():
    step = Affine(0.3)
    result = iterate(
        step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-40, floor=1e-12, max_iter=10_000
    )
    assert len(result.trace) < 100
    assert result.residual < 1e-14


def test_rows_that_were_left_count_in_the_residual_after_the_mixing_too():
    # The second row is noise, so that the mixing stalls and gives way to plain steps.
    rows, gains, generator = Rows(2, (40,)), torch.linspace(0.5, 0.999, 40), torch.Generator().manual_seed(0)

    def step(z):
        return torch.stack([gains * z[0, 0] + 1, 1e-3 * torch.randn(40, generator=generator)]).unsqueeze(0)

    def first(points, norms):
        return torch.tensor([True, False])

    result = iterate(step, torch.zeros(1, 2, 40), max_iter=80, rows=lambda: rows, enough=first)
    assert result.trace[-1] > 10 * result.solved  # plain steps move the first row too
    assert result.left == 1
    first_row = (step(result.value) - result.value)[0, 0]
    assert result.residual > float(torch.linalg.vector_norm(first_row))


class _Transfers(TorchDispatchMode):
    """Counts the numbers that are asked of a device: each makes an accelerator wait for all that it was told to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("gain", "least"), [(0.3, 5), (0.97, 15)])
def test_a_step_waits_for_the_device_once(gain, least, monkeypatch):
    to_host, transfers = torch.Tensor.cpu, _Transfers()

    def counted(tensor):
        transfers.count += 1
        return to_host(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    diagonal, offset = gain * torch.linspace(-1, 1, 400), torch.randn(1, 400)
    with transfers:
        result = iterate(lambda z: diagonal * z + offset, torch.zeros_like(offset), tol=1e-4)
    assert result.steps >= least
    assert result.steps <= transfers.count <= result.steps + 1
