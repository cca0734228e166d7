"""SHINE: the inverse of the forward solver, against the same built densely by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchdeq
from problems import contraction, normal, relative_error, solve

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError
from torchdeq_ep.modes import Shine
from torchdeq_ep.relaxation.inverse import InverseEstimate
from torchdeq_ep.state import Equilibrium

WEIGHT = contraction(5, 0, 0.8)
DRIVE = normal(3, 5, seed=1)


def f(z):
    return torch.tanh(z @ WEIGHT.T + DRIVE)


def by_hand(row, steps, tol=1e-9):
    """Broyden's method for one sample with a dense inverse: the state, and the inverse."""
    step = lambda z: torch.tanh(WEIGHT @ z + DRIVE[row])  # noqa: E731
    z, h = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    r = z - step(z)
    for _ in range(steps - 1):
        dz = -h @ r
        z = z + dz
        new = z - step(z)
        dr, r = new - r, new
        h = h + torch.outer(dz - h @ dr, dz @ h) / (dz @ h @ dr)
    return z, h


def attached(backward, steps=6, solver="broyden-inverse", tol=1e-30):
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reports = []
    z = tep.loop(
        lambda z: torch.tanh(z @ WEIGHT.T + DRIVE + bias),
        torch.zeros_like(DRIVE),
        steps,
        backward,
        solver=solver,
        tol=tol,
        writer=reports.append,
    )
    return z, bias, reports


def test_the_error_vector_is_the_transposed_inverse_of_the_forward_pass():
    g = normal(3, 5, seed=2)
    z, bias, _ = attached("shine")
    (found,) = torch.autograd.grad(z, bias, g)
    expected = torch.zeros(5, dtype=torch.float64)
    for row in range(3):
        state, h = by_hand(row, 6)
        slope = 1 - torch.tanh(WEIGHT @ state + DRIVE[row]) ** 2
        expected += slope * (h.T @ g[row])
    assert relative_error(found, expected) < 1e-9


def exact(g):
    z, bias, _ = attached("ift:tol=1e-13", 60, tol=1e-13)
    return torch.autograd.grad(z, bias, g)[0]


@pytest.mark.parametrize(("spec", "error"), [("one-step", 2.0), ("shine", 0.5), ("shine:refine=3", 0.2)])
def test_it_lies_between_one_step_and_the_exact_gradient(spec, error):
    g = normal(3, 5, seed=2)
    z, bias, _ = attached(spec, 60, tol=1e-10)
    assert relative_error(torch.autograd.grad(z, bias, g)[0], exact(g)) < error


def test_refinement_tends_to_implicit_differentiation():
    g = normal(3, 5, seed=2)
    errors = []
    for refine in (0, 2, 4, 20):
        z, bias, _ = attached(f"shine:refine={refine}", 60, tol=1e-10)
        errors.append(relative_error(torch.autograd.grad(z, bias, g)[0], exact(g)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_a_direction_that_is_too_long_falls_back_to_one_step():
    ones = torch.ones(2, 2, dtype=torch.float64)
    estimate = InverseEstimate(2, [torch.tensor([[1.0, 0.0], [0.125, 0.0]]).double()], [ones.clone()])
    free = Equilibrium(lambda z: 0.5 * z, 0 * ones, 0 * ones, ones, 1e-16, history=estimate)
    assert torch.equal(Shine().solve(free)[0], torch.tensor([[2.0, 2.0], [1.125, 1.125]]).double())
    assert torch.equal(Shine(fallback=1.3).solve(free)[0], torch.tensor([[1.0, 1.0], [1.125, 1.125]]).double())


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_on_a_deq(tensors, core):
    deq = torchdeq.get_deq(core=core, f_solver="broyden-inverse", f_tol=1e-10, f_max_iter=60)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    step = lambda z: torch.tanh(z @ WEIGHT.T + DRIVE + bias)  # noqa: E731

    def both(a, b):
        value = step(torch.cat([a, b], 1))
        return value[:, :2], value[:, 2:]

    def gradient(spec):
        with tep.use_backward(deq, spec):
            start = torch.zeros_like(DRIVE)
            z = deq(step, start)[0][-1] if tensors == 1 else deq(both, (start[:, :2], start[:, 2:]))[0][-1]
            joined = z if tensors == 1 else torch.cat(list(z), 1)
            return torch.autograd.grad(joined.square().sum(), bias)[0]

    exact = gradient("ift:tol=1e-12")
    assert relative_error(gradient("shine:refine=20"), exact) < 1e-7
    assert 1e-6 < relative_error(gradient("shine"), exact) < 0.5


def test_rows_that_are_coupled_share_an_inverse():
    mixing = contraction(4, 1, 0.7)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    g = normal(4, 3, seed=2)

    def gradient(spec):
        z = tep.loop(
            lambda z: torch.tanh(mixing @ z + 0.3 + bias), g * 0, 60, spec, solver="broyden-inverse", tol=1e-12
        )
        return torch.autograd.grad(z, bias, g)[0]

    assert relative_error(gradient("shine:refine=30"), gradient("ift:tol=1e-12")) < 1e-8


def test_without_its_solver_it_is_an_error_that_names_it():
    deq = torchdeq.get_deq(f_solver="broyden")
    with pytest.raises(MissingHistoryError, match="broyden-inverse"):
        tep.use_backward(deq, "shine")
    with pytest.raises(MissingHistoryError, match="broyden-inverse"):
        attached("shine", solver="anderson")
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    z = tep.attach(lambda z: f(z) + bias, solve(f, DRIVE), "shine")
    with pytest.raises(MissingHistoryError, match="f_solver='broyden-inverse'"):
        z.sum().backward()


@pytest.mark.parametrize("spec", ["shine:refine=-1", "shine:fallback=0.5", "shine:fallback=much"])
def test_impossible_options(spec):
    with pytest.raises(InvalidOptionError):
        tep.get_backward(spec)


def test_the_mode_is_a_value_and_a_switched_deq_can_be_copied():
    mode = tep.get_backward("shine:refine=2")
    assert pickle.loads(pickle.dumps(mode)) == mode
    deq = torchdeq.get_deq(f_solver="broyden-inverse")
    solver = deq.f_solver
    handle = tep.use_backward(deq, mode)
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        other(lambda z, b=bias: f(z) + b, torch.zeros_like(DRIVE))[0][-1].sum().backward()
        assert bias.grad is not None
    handle.remove()
    assert deq.f_solver is solver


def test_evaluation_keeps_nothing():
    deq = torchdeq.get_deq(f_solver="broyden-inverse")
    tep.use_backward(deq, "shine")
    deq.eval()
    with torch.no_grad():
        deq(f, torch.zeros_like(DRIVE))
    assert deq.produce_grad[-1].slot.history is None
