"""`loop`: the values of a loop written by hand, bit by bit, with the gradient of one's choice."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from problems import contraction, normal, relative_error
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MapContractError, MissingHistoryError

pytestmark = pytest.mark.filterwarnings("ignore:the free phase stopped:torchdeq_ep.errors.ConvergenceWarning")


class Problem:
    """`f(z) = tanh(W z + U x)`, its leaves, and a loss."""

    def __init__(self, n=6, batch=5):
        self.weight = contraction(n, 0, 0.9).requires_grad_()
        self.drive = normal(n, 3, seed=1).requires_grad_()
        self.x, self.z0 = normal(batch, 3, seed=2).requires_grad_(), normal(batch, n, seed=3).requires_grad_()
        self.g = normal(batch, n, seed=4)

    def f(self, z):
        return torch.tanh(z @ self.weight.T + self.x @ self.drive.T)

    def states(self, steps, z=None):
        states = [self.z0 if z is None else z]
        for _ in range(steps):
            states.append(self.f(states[-1]))
        return states

    def gradient(self, z, leaves=None, g=None):
        leaves = leaves or (self.weight, self.drive, self.x)
        return torch.autograd.grad(z, leaves, self.g if g is None else g, allow_unused=True)


@pytest.fixture
def problem():
    return Problem()


def assert_same(found, expected, tolerance=1e-13):
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


def test_all_steps_unrolled_is_autograd(problem):
    leaves = (problem.weight, problem.drive, problem.x, problem.z0)
    by_hand = problem.states(6)[-1]
    z = tep.loop(problem.f, problem.z0, 6)
    assert torch.equal(z, by_hand)
    for one, other in zip(problem.gradient(z, leaves), problem.gradient(by_hand, leaves), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_the_last_steps_unrolled_are_truncated_backpropagation(problem, k):
    start = problem.states(max(6 - k, 0))[-1]
    by_hand = problem.states(min(k, 6), start.detach() if k < 6 else start)[-1]
    z = tep.loop(problem.f, problem.z0, 6, f"unrolled:k={k}")
    assert torch.equal(z, by_hand)
    assert_same(problem.gradient(z), problem.gradient(by_hand), 1e-15)


@pytest.mark.parametrize("spec", ["one-step", "unrolled:k=1", "neumann:k=1"])
def test_one_step_is_the_gradient_of_the_last_step(problem, spec):
    before = problem.states(5)[-1].detach()
    z = tep.loop(problem.f, problem.z0, 6, spec)
    assert torch.equal(z, problem.f(before))
    assert_same(problem.gradient(z), problem.gradient(problem.f(before)), 1e-15)


@pytest.mark.parametrize("spec", ["ift", "aep", "neumann:k=200", "ep-infinitesimal:correction=asymmetric"])
def test_equilibrium_gradients_are_those_of_attach(problem, spec):
    z = tep.loop(problem.f, problem.z0, 400, spec)
    exact = problem.gradient(problem.states(400)[-1])
    assert_same(problem.gradient(z), exact, 1e-5)


@pytest.mark.parametrize("solver", ["relaxation", "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_a_solver_takes_the_place_of_the_steps(problem, solver):
    reports = []
    z = tep.loop(problem.f, problem.z0, 200, "ift", solver=solver, tol=1e-10, on_stop=reports.append)
    assert_same(problem.gradient(z), problem.gradient(problem.states(400)[-1]), 1e-5)
    assert reports[0].residual < 1e-5
    assert reports[0].is_equilibrium


@pytest.mark.parametrize("solver", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_unrolled_differentiates_the_steps_of_a_solver(problem, solver):
    z = tep.loop(problem.f, problem.z0, 3, "unrolled", solver=solver, tol=1e-12)
    by_hand = problem.states(4)[-1]
    assert torch.equal(z, by_hand)
    assert_same(problem.gradient(z), problem.gradient(by_hand), 1e-14)


def two_states(problem):
    def f(a, b):
        value = problem.f(torch.cat([a.flatten(1), b], 1))
        return value[:, :4].reshape(-1, 2, 2), value[:, 4:]

    return f, (problem.z0[:, :4].reshape(-1, 2, 2), problem.z0[:, 4:])


@pytest.mark.parametrize("spec", ["unrolled", "one-step", "unrolled:k=3", "neumann:k=3", "phantom:k=3", "ift"])
@pytest.mark.parametrize("solver", [None, "anderson"])
def test_several_tensors(problem, spec, solver):
    f, start = two_states(problem)
    if solver and spec == "unrolled":
        with pytest.raises(MissingHistoryError, match="mixes or extrapolates"):
            tep.loop(f, start, 6, spec, solver=solver)
        return
    z = tep.loop(f, start, 6, spec, solver=solver)
    joined = tep.loop(problem.f, problem.z0, 6, spec, solver=solver)
    assert isinstance(z, tuple)
    flat = torch.cat([z[0].flatten(1), z[1]], 1)
    assert relative_error(flat.detach(), joined.detach()) < 1e-13
    assert_same(problem.gradient(flat), problem.gradient(joined), 1e-8 if spec == "ift" else 1e-11)


# --- segments --------------------------------------------------------------------------------------------------------


def reasoner(problem, spec_steps, ends):
    """A recursive reasoner by hand: a gradient through the last steps of each segment, and a detached carry."""
    states, z, begin = [], problem.z0, 0
    for end in ends:
        k = min(spec_steps or end - begin, end - begin)
        with torch.no_grad():
            for _ in range(end - begin - k):
                z = problem.f(z)
        for _ in range(k):
            z = problem.f(z)
        states.append(z)
        z, begin = z.detach(), end
    return states


@pytest.mark.parametrize(("spec", "k"), [("unrolled", None), ("unrolled:k=2", 2), ("one-step", 1)])
def test_deep_supervision_with_a_detached_carry(problem, spec, k):
    ends = [3, 4, 9]
    found = tep.loop(problem.f, problem.z0, 9, spec, supervise=ends)
    expected = reasoner(problem, k, ends)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert_same(problem.gradient(sum(found)), problem.gradient(sum(expected)), 1e-14)


def test_deep_supervision_with_the_graph_of_all_segments(problem):
    found = tep.loop(problem.f, problem.z0, 9, supervise=[3, 9], carry="graph")
    states = problem.states(9)
    assert torch.equal(found[0], states[3])
    assert_same(problem.gradient(sum(found)), problem.gradient(states[3] + states[9]), 1e-14)


# --- halting ---------------------------------------------------------------------------------------------------------


def halting(problem, steps, z=None):
    """By hand: a sample halts once its first entry has moved by less than 0.05 in a step."""
    z = problem.z0 if z is None else z
    active = torch.ones(len(z), dtype=torch.bool)
    made, halt = torch.zeros(len(z), dtype=torch.int64), Halt()
    for step in range(steps):
        z = torch.where(active[:, None], problem.f(z), z)
        made += active
        active = active & ~halt(z.detach(), step + 1)
        if not active.any():
            break
    return z, made


class Halt:
    def __init__(self):
        self.last = None

    def __call__(self, z, step):
        last, self.last = self.last, z.clone()
        return torch.zeros(len(z), dtype=torch.bool) if last is None else (z - last)[:, 0].abs() < 0.05


@pytest.mark.parametrize("spec", ["unrolled", "unrolled:k=2", "one-step", "neumann:k=4", "ift"])
def test_halting_has_the_values_of_the_loop_by_hand(problem, spec):
    reports = []
    by_hand, made = halting(problem, 12)
    assert len(set(made.tolist())) > 1
    z = tep.loop(problem.f, problem.z0, 12, spec, halt=Halt(), on_stop=reports.append)
    assert torch.equal(z, by_hand)
    assert torch.equal(reports[0].row_steps, made)
    with torch.no_grad():
        assert torch.equal(tep.loop(problem.f, problem.z0, 12, spec, halt=Halt()), by_hand)


def test_halting_with_all_steps_unrolled_is_autograd(problem):
    by_hand, _ = halting(problem, 12)
    assert_same(problem.gradient(tep.loop(problem.f, problem.z0, 12, halt=Halt())), problem.gradient(by_hand), 1e-14)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", ["unrolled", "one-step"])
def test_a_halted_sample_has_the_gradient_of_its_own_last_steps(problem, k, name):
    if name == "one-step" and k > 1:
        return
    _, made = halting(problem, 12)
    z = tep.loop(problem.f, problem.z0, 12, f"unrolled:k={k}" if name == "unrolled" else name, halt=Halt())
    expected = torch.zeros_like(problem.weight)
    for row, count in enumerate(made.tolist()):
        start = problem.states(max(count - k, 0))[-1].detach()
        own = problem.states(min(k, count), start)[-1]
        expected += torch.autograd.grad(own[row], problem.weight, problem.g[row])[0]
    assert relative_error(problem.gradient(z)[0], expected) < 1e-13


@pytest.mark.parametrize("spec", ["unrolled", "unrolled:k=2", "one-step"])
def test_a_sample_that_has_halted_adds_nothing_in_later_segments(problem, spec):
    def halt(z, step):
        return torch.tensor([True, False, False, False, False]) & (step == 2)

    found = tep.loop(problem.f, problem.z0, 6, spec, supervise=[3, 6], halt=halt)
    assert torch.equal(found[0][0], found[1][0])
    last = torch.zeros_like(problem.g)
    last[0] = problem.g[0]
    assert all(t is None or not t.any() for t in problem.gradient(found[1], g=last))
    assert problem.gradient(found[0], g=last)[0].any()


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning")
def test_a_model_with_halting_and_detached_carries_has_the_values_of_the_loop_by_hand():
    """A recursive reasoner in float32: two states, attention, segments, halting by a learned head."""
    torch.manual_seed(0)
    block, halt_head, x = (
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        nn.Linear(8, 1),
        torch.randn(6, 5, 8),
    )

    def f(high, low):
        low = block(high + low + x)
        return block(high + low), low

    def halted(high):
        return halt_head(high.mean(1)).squeeze(1) > 0.3

    z, active, expected = (torch.zeros(6, 5, 8), torch.zeros(6, 5, 8)), torch.ones(6, dtype=torch.bool), []
    for _ in range(3):
        for _ in range(4):
            value = f(*z)
            z = tuple(torch.where(active[:, None, None], new, old) for new, old in zip(value, z, strict=True))
            active = active & ~halted(z[0].detach())
        expected.append(z)
        z = tuple(tensor.detach() for tensor in z)
    for spec in ("unrolled", "one-step", "unrolled:k=2", "aep"):
        start = (torch.zeros(6, 5, 8), torch.zeros(6, 5, 8))
        halt = lambda z, step: halted(z[0])  # noqa: E731
        found = tep.loop(f, start, 12, spec, supervise=[4, 8, 12], halt=halt)
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        sum(t.square().sum() for state in found for t in state).backward()


# --- where it stopped ------------------------------------------------------------------------------------------------


def test_the_report_says_where_the_loop_stopped(problem):
    reports = []
    tep.loop(problem.f, problem.z0, 3, on_stop=reports.append)
    states = problem.states(3)
    sizes = [float((b - a).detach().norm()) for a, b in pairwise(states)]
    report = reports[0]
    assert report.steps == 3
    assert report.residual == pytest.approx(sizes[-1] / float(states[2].detach().norm()))
    assert report.contraction == pytest.approx(sizes[-1] / sizes[-2])
    assert len(report.trace) == 3
    assert "unrolled" in str(report)
    tep.loop(problem.f, problem.z0, 200, on_stop=reports.append)
    assert reports[1].is_equilibrium
    assert "is meaningful" in str(reports[1])


def test_steps_that_grow_have_no_equilibrium_in_sight():
    reports = []
    tep.loop(lambda z: 2 * z, torch.ones(2, 2), 4, on_stop=reports.append)
    assert reports[0].distance == float("inf")
    assert "no equilibrium in sight" in str(reports[0])


def test_a_lasting_memory_warns_once(problem):
    memory = tep.Memory(lasting=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            tep.loop(problem.f, problem.z0, 3, "ift", memory=memory).sum().backward()
    kinds = [warning.category for warning in caught]
    assert len(kinds) == len(set(map(str, (warning.message for warning in caught))))
    assert len(kinds) <= 2
    assert memory.passes == 5


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"supervise": []}, "rising numbers from 1 to 4"),
        ({"supervise": [3, 2]}, "rising numbers"),
        ({"supervise": [5]}, "rising numbers"),
        ({"carry": "none"}, "carry"),
        ({"carry": "graph", "backward": "ift"}, "only backward='unrolled'"),
        ({"solver": "anderson", "supervise": [2, 4]}, "no segments"),
        ({"halt": lambda z, step: z > 0}, "one boolean for each sample"),
    ],
)
def test_impossible_options(problem, options, message):
    with pytest.raises(InvalidOptionError, match=message):
        tep.loop(problem.f, problem.z0, **{"steps": 4, **options})


def test_a_map_that_is_none():
    with pytest.raises(MapContractError, match="keep the shape"):
        tep.loop(lambda z: z[:1], torch.zeros(3, 2), 2)


@pytest.mark.parametrize("solver", [None, "anderson"])
def test_phantom_and_its_kin_need_no_history_and_say_so_otherwise(problem, solver):
    tep.loop(problem.f, problem.z0, 3, "phantom", solver=solver)
    with pytest.raises(MissingHistoryError):
        tep.attach(problem.f, problem.z0, "unrolled")


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


@pytest.mark.parametrize("options", [{}, {"supervise": [2, 4]}, {"halt": lambda z, step: z.low[:, 0] > 0.4 + 0 * step}])
@pytest.mark.parametrize("backward", ["unrolled", "one-step", "ift"])
def test_a_namedtuple_of_states_is_one_at_every_step_and_in_the_end(backward, options):
    weight = torch.tensor(0.5, requires_grad=True)

    def f(pair):
        return Pair(weight * pair.high + 0.1, weight * pair.low + 0.2)

    found = tep.loop(f, Pair(torch.zeros(2, 1), torch.zeros(2, 1)), 4, backward, **options)
    states = found if isinstance(found, list) else [found]
    assert all(type(state) is Pair for state in states)
    sum(state.low.sum() + state.high.sum() for state in states).backward()
    assert weight.grad.isfinite()
