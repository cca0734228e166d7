"""The loop as a solver of torchdeq: it takes their options, stops where they stop, and drives free phases and IFT."""

import copy
import pickle

import pytest
import torch
import torchdeq
from problems import Affine, contraction, relative_error
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.host.solver import relaxation_solver


def affine(gain=0.9, n=12, batch=3):
    weight, drive = contraction(n, 0, gain), torch.randn(batch, n, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - weight, drive.T).T
    return (lambda z: z @ weight.T + drive), torch.zeros(batch, n, dtype=torch.float64), exact


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
def test_stops_where_torchdeq_would(stop_mode, tol):
    f, start, exact = affine()
    visited = []

    def watched(z):
        visited.append((z, f(z)))
        return visited[-1][1]

    z, _, info = relaxation_solver(watched, start, max_iter=300, tol=tol, stop_mode=stop_mode)
    residuals = [
        (value - point).norm(dim=1) / (value.norm(dim=1) if stop_mode == "rel" else 1) for point, value in visited
    ]
    assert float(residuals[-1].max()) <= tol < float(residuals[-2].max())
    assert torch.equal(z, visited[-1][1])
    assert float(info[f"{stop_mode}_lowest"].max()) <= tol
    assert relative_error(z, exact) < 30 * tol
    assert info[f"{stop_mode}_trace"].shape == (1, int(info["nstep"]))


def test_values_on_the_way_are_those_of_the_map():
    f, start, _ = affine()
    visited = []

    def watched(z):
        visited.append(f(z))
        return visited[-1]

    _, trajectory, _ = relaxation_solver(watched, start, max_iter=6, tol=1e-12, indexing=[2, 5])
    assert [torch.equal(a, b) for a, b in zip(trajectory, (visited[1], visited[4]), strict=True)] == [True, True]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 4), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_any_shape_and_dtype(shape, dtype):
    drive = torch.randn(shape).to(dtype)
    z, _, _ = relaxation_solver(lambda z: 0.5 * z + drive, torch.zeros(shape, dtype=dtype), tol=1e-4)
    assert z.shape == shape
    assert z.dtype == dtype
    assert torch.allclose(z, 2 * drive, rtol=2e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-3)


def test_unknown_stop_modes_are_named():
    f, start, _ = affine()
    with pytest.raises(InvalidOptionError, match="abs, rel"):
        relaxation_solver(f, start, stop_mode="relative")


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(6, 6).double()
        nn.init.orthogonal_(self.linear.weight, gain=0.8)
        self.deq = torchdeq.get_deq(**options)

    def forward(self, x):
        states, info = self.deq(lambda z: torch.tanh(self.linear(z) + x), torch.zeros_like(x))
        return states[-1], info


@pytest.mark.parametrize("options", [{"core": "sliced"}, {"core": "indexing", "n_states": 3}])
def test_free_phase_and_adjoint_of_a_deq(options):
    x = torch.randn(4, 6, dtype=torch.float64)
    results = {}
    for name in ("relaxation", "fixed_point_iter"):
        torch.manual_seed(0)
        model = Model(
            ift=True, f_solver=name, b_solver=name, f_tol=1e-11, b_tol=1e-11, f_max_iter=300, b_max_iter=300, **options
        )
        z, _ = model(x)
        z.square().sum().backward()
        results[name] = z.detach(), model.linear.weight.grad
    for ours, theirs in zip(results["relaxation"], results["fixed_point_iter"], strict=True):
        assert relative_error(ours, theirs) < 1e-8


def test_a_switched_model_with_it_can_be_copied():
    model = Model(f_solver="relaxation", core="ep-sliced", f_tol=1e-10)
    x = torch.randn(4, 6, dtype=torch.float64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x)[0], model(x)[0])
    with tep.use_backward(model, "ep", solver="relaxation"):
        model(x)[0].sum().backward()
    assert torch.isfinite(model.linear.weight.grad).all()


def test_no_steps_at_all_are_refused():
    with pytest.raises(InvalidOptionError, match="max_iter"):
        relaxation_solver(torch.cos, torch.zeros(1, 1), max_iter=0)


@pytest.mark.parametrize("memory", [1, 6])
def test_the_map_may_return_a_buffer_that_it_overwrites(memory):
    step, buffer = Affine(0.5, nodes=1), torch.empty(1, 20, dtype=torch.float64)

    def into_the_buffer(z):
        buffer.copy_(step(z))
        return buffer

    z, _, _ = relaxation_solver(into_the_buffer, torch.zeros_like(buffer), tol=1e-8, max_iter=200, memory=memory)
    assert step.residual(z) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("indexing", [[1, 2, 4], [50], []])
def test_no_two_of_the_tensors_that_it_returns_share_memory_with_each_other_or_with_the_map(dtype, indexing):
    start, buffer, visited = torch.zeros(2, 3, dtype=dtype), torch.empty(2, 3, dtype=dtype), []

    def into_the_buffer(z):
        visited.append(buffer.copy_(0.5 * z + 1).clone())
        return buffer

    z, trajectory, _ = relaxation_solver(into_the_buffer, start, max_iter=6, tol=1e-12, indexing=indexing)
    expected = [visited[k - 1] for k in indexing if k <= len(visited)] or [z] * bool(indexing)
    assert all(torch.equal(value, at_index) for value, at_index in zip(trajectory, expected, strict=True))
    tensors = [z, *trajectory, start, buffer]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_a_map_without_a_finite_value_gives_a_copy_of_the_start():
    start = torch.ones(2, 3)
    z, _, _ = relaxation_solver(lambda z: z * torch.nan, start)
    assert torch.equal(z, start)
    assert z.data_ptr() != start.data_ptr()


def test_rows_with_spectra_of_their_own_are_mixed_apart():
    generator = torch.Generator().manual_seed(0)
    weights = torch.stack([torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]] * 12)
    scales = 1 - torch.logspace(-3, 0, 12, dtype=torch.float64)
    spectra = scales[:, None] * torch.rand(12, 24, generator=generator, dtype=torch.float64)
    offset = torch.randn(12, 24, generator=generator, dtype=torch.float64)

    def f(z):
        return torch.einsum("rij,rj,rkj,rk->ri", weights, spectra, weights, z) + offset

    def coupled(z):  # the same to within rounding, but every row is seen by every other
        return f(z + 1e-9 * z.mean(0))

    steps = {}
    for name, step in (("apart", f), ("together", coupled)):
        z, _, info = relaxation_solver(step, torch.zeros_like(offset), max_iter=400, tol=1e-8, stop_mode="rel")
        steps[name] = int(info["nstep"])
        assert float((f(z) - z).norm() / z.norm()) < 1e-6
    assert steps["apart"] < steps["together"]
