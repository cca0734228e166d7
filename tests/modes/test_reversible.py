"""Reversible steps: the gradient against autograd through the same steps, and what rounding leaves of it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdeq
from problems import contraction, normal, relative_error
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError, ReconstructionWarning
from torchdeq_ep.measuring.costs import peak_memory
from torchdeq_ep.relaxation.reversing import step_forth


class Problem:
    """A map over a weight, an input that an encoder computes, and a bias that both share."""

    def __init__(self, dtype=torch.float64, gain=0.9, n=6, batch=4):
        self.weight = contraction(n, 0, gain).to(dtype).requires_grad_()
        self.encoder = contraction(n, 1, 0.8).to(dtype).requires_grad_()
        self.bias = (0.1 * normal(n, seed=2)).to(dtype).requires_grad_()
        self.z0 = normal(batch, n, seed=3).to(dtype).requires_grad_()
        self.data, self.g = normal(batch, n, seed=4).to(dtype), normal(batch, n, seed=5).to(dtype)
        self.encoded = 0

    @property
    def leaves(self):
        return self.weight, self.encoder, self.bias, self.z0

    def map(self):
        x = torch.tanh(self.data @ self.encoder + self.bias)
        x.register_hook(self._count)
        return lambda z: torch.tanh(z @ self.weight.T + x + self.bias)

    def _count(self, gradient):
        self.encoded += 1

    def by_hand(self, steps, beta=0.5):
        f, y, z = self.map(), self.z0, self.z0
        for _ in range(steps):
            y, z = step_forth(f, y, z, beta)
        return f(z)

    def reversible(self, steps, **options):
        return tep.loop(self.map(), self.z0, 2 * steps, "reversible", solver="reversible", tol=1e-30, **options)

    def gradient(self, z):
        return torch.autograd.grad(z, self.leaves, self.g)


def largest_error(found, expected):
    return max(relative_error(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps", [1, 3, 10, 15])
def test_the_gradient_is_that_of_autograd_through_the_steps(steps):
    problem = Problem()
    expected = problem.by_hand(steps)
    found = problem.reversible(steps)
    assert relative_error(found.detach(), expected.detach()) < 1e-15
    # Rounding of the way back grows by two a step, and more where the map itself expands backwards.
    assert largest_error(problem.gradient(found), problem.gradient(expected)) < 1e-10


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_in_single_precision(steps):
    problem = Problem(torch.float32)
    assert largest_error(problem.gradient(problem.reversible(steps)), problem.gradient(problem.by_hand(steps))) < 1e-4


def test_the_encoder_is_differentiated_once():
    problem = Problem()
    z = problem.reversible(5)
    problem.encoded = 0
    z.backward(problem.g)
    # The map calls for its gradient in every step, but what lies behind the input sees the sum alone.
    count = problem.encoded
    assert problem.encoder.grad is not None
    assert count >= 1
    assert largest_error([problem.encoder.grad], [problem.gradient(problem.by_hand(5))[1]]) < 1e-12


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("tensors", [1, 2])
def test_on_a_deq(core, tensors):
    problem = Problem()
    deq = torchdeq.get_deq(core=core, f_solver="reversible", f_tol=1e-30, f_max_iter=10)
    f = problem.map()

    def both(a, b):
        value = f(torch.cat([a, b], 1))
        return value[:, :2], value[:, 2:]

    with tep.use_backward(deq, "reversible"):
        reports = []
        writer = lambda statistics: reports.append(statistics["report"])  # noqa: E731
        start = problem.z0
        if tensors == 1:
            z = deq(f, start, backward_writer=writer)[0][-1]
        else:
            z = torch.cat(list(deq(both, (start[:, :2], start[:, 2:]), backward_writer=writer)[0][-1]), 1)
        found = problem.gradient(z)
        with torch.no_grad():
            deq.eval()
            deq(f, start)
            deq.train()
    assert largest_error(found, problem.gradient(problem.by_hand(5))) < 1e-12
    assert len(reports) == 1
    assert reports[0].residual < 1e-12


def test_a_convolutional_map_with_statistics():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 2, 3, padding=1).double(), nn.BatchNorm2d(2).double()
    x, g = normal(3, 2, 5, 5, seed=1), normal(3, 2, 5, 5, seed=2)
    leaves = list(conv.parameters()) + list(norm.parameters())

    def f(z):
        return torch.tanh(0.5 * norm(conv(z)) + x)

    y = z = torch.zeros_like(x)
    for _ in range(6):
        y, z = step_forth(f, y, z, 0.5)
    expected = torch.autograd.grad(f(z), leaves, g, allow_unused=True)
    norm.reset_running_stats()
    z = tep.loop(f, torch.zeros_like(x), 12, "reversible", solver="reversible", tol=1e-30)
    mean = norm.running_mean.clone()
    count = int(norm.num_batches_tracked)
    found = torch.autograd.grad(z, leaves, g, allow_unused=True)
    for one, other in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        assert relative_error(one, other) < 1e-10
    assert torch.equal(norm.running_mean, mean)
    assert int(norm.num_batches_tracked) == count


class Custom(torch.autograd.Function):
    """A function of a parameter that nothing in Python sees it take."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return z @ weight

    @staticmethod
    def backward(ctx, gradient):
        z, weight = ctx.saved_tensors
        return gradient @ weight.T, z.T @ gradient


@pytest.mark.parametrize("computed", [False, True])
def test_parameters_of_custom_functions_are_found(computed):
    weight, z0, g = contraction(4, 0, 0.8).requires_grad_(), normal(3, 4), normal(3, 4, seed=1)

    def f(matrix):
        return lambda z: torch.tanh(Custom.apply(z, matrix) + 0.3)

    def own(weight):
        return weight.exp() / 9 if computed else weight

    y = z = z0
    for _ in range(5):
        y, z = step_forth(f(own(weight)), y, z, 0.5)
    (expected,) = torch.autograd.grad(f(own(weight))(z), weight, g)
    z = tep.loop(f(own(weight)), z0, 10, "reversible", solver="reversible", tol=1e-30)
    assert relative_error(torch.autograd.grad(z, weight, g)[0], expected) < 1e-12


def test_what_rounding_leaves_is_measured_and_named():
    problem, reports = Problem(torch.float32), []
    expected = problem.gradient(problem.by_hand(50))
    with pytest.warns(ReconstructionWarning, match="grows by 1 / "):
        found = problem.gradient(problem.reversible(50, writer=reports.append))
    assert reports[0].residual > 1e-3
    assert largest_error(found, expected) > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.gradient(problem.reversible(5, writer=reports.append))
    assert reports[1].residual < 1e-4


def test_memory_does_not_grow_with_the_number_of_steps():
    def peak(steps, spec, solver):
        weight = torch.nn.Parameter(0.5 * torch.eye(64))
        x = torch.randn(256, 64)

        def step():
            z = tep.loop(
                lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), steps, spec, solver=solver, tol=1e-30
            )
            z.sum().backward()

        step()
        return peak_memory(step, torch.device("cpu"))

    few, many = (peak(steps, "reversible", "reversible") for steps in (4, 20))
    assert many < 1.1 * few
    assert peak(20, "unrolled", None) > 2 * peak(4, "unrolled", None)


def test_one_without_the_other_is_an_error():
    problem = Problem()
    with pytest.raises(MissingHistoryError, match="f_solver='reversible'"):
        tep.use_backward(torchdeq.get_deq(), "reversible")
    deq = torchdeq.get_deq(f_solver="reversible")
    with pytest.raises(MissingHistoryError, match="backward='reversible'"):
        tep.use_backward(deq, "ep")
    with pytest.raises(MissingHistoryError, match="without its backward"):
        deq(problem.map(), problem.z0)
    with pytest.raises(MissingHistoryError, match="another solver was used"):
        tep.attach(problem.map(), problem.z0, "reversible")
    for options in ({"solver": "anderson", "backward": "reversible"}, {"solver": "reversible", "backward": "ift"}):
        with pytest.raises(MissingHistoryError):
            tep.loop(problem.map(), problem.z0, 4, **options)


def test_the_relaxation_may_be_chosen_by_torchdeqs_options():
    problem = Problem()
    deq = torchdeq.get_deq(f_solver="reversible", f_tol=1e-30, f_max_iter=10)
    with tep.use_backward(deq, "reversible"):
        z = deq(problem.map(), problem.z0, solver_kwargs={"beta": 0.8})[0][-1]
        assert largest_error(problem.gradient(z), problem.gradient(problem.by_hand(5, 0.8))) < 1e-10
        with pytest.raises(InvalidOptionError, match="beta"):
            deq(problem.map(), problem.z0, solver_kwargs={"beta": 1.0})
