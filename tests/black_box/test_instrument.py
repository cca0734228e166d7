"""Solvers that fail, hang or run at the same time."""

import math
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import relative_error

import torchdeq_ep as tep
from torchdeq_ep.errors import SolverError, SolverNonFiniteError, SolverShapeError, SolverTimeoutError


class Faulty:
    """A solver that misbehaves on the calls named."""

    def __init__(self, network, fault, calls=(3,)):
        self.network, self.fault, self.faulty_calls, self.calls = network, fault, calls, 0
        self.lock = threading.Lock()

    def __call__(self, current):
        with self.lock:
            self.calls += 1
            faulty = self.calls in self.faulty_calls
        z = self.network.solve(current)
        return self.fault(z) if faulty else z


def raises(z):
    raise ZeroDivisionError("a wire is loose")


def hangs(z):
    time.sleep(5)
    return z


FAULTS = {
    "raises": (raises, SolverError),
    "hangs": (hangs, SolverTimeoutError),
    "nan": (lambda z: z * math.nan, SolverNonFiniteError),
    "shape": (lambda z: z[:1], SolverShapeError),
    "no array": (lambda z: "overload", SolverShapeError),
    "complex": (lambda z: z + 0j, SolverShapeError),
}


@pytest.mark.parametrize("executor", [None, "thread"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_third_call_is_named(network, fault, executor):
    misbehave, kind = FAULTS[fault]
    before = network.theta.detach().clone()
    z = tep.attach_equilibrium(
        Faulty(network, misbehave),
        network.force,
        network.theta,
        network.x,
        stencil=tep.Stencil.symmetric(0.05),
        timeout=0.3,
        executor=executor,
    )
    start = time.monotonic()
    with pytest.raises(kind, match=r"nudge [+-]0.05") as caught:
        network.loss(z).backward()
    assert time.monotonic() - start < 2
    assert type(caught.value) is kind
    assert abs(caught.value.nudge) == 0.05
    assert caught.value.current.shape == network.x.shape
    assert network.theta.grad is None
    assert torch.equal(network.theta, before)
    if fault == "raises":
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert "a wire is loose" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.nudge) == (str(caught.value), caught.value.nudge)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried(network, fault):
    reports = []
    z = tep.attach_equilibrium(
        Faulty(network, FAULTS[fault][0], calls=(1, 4)),
        network.force,
        network.theta,
        network.x,
        shape=network.x.shape,
        timeout=0.3,
        retries=1,
        writer=reports.append,
    )
    gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
    assert relative_error(gradient, network.reference("ift")[0]) < 1e-9
    assert reports[0].failures == 2


def test_too_few_retries(network):
    solve = Faulty(network, raises, calls=(2, 3, 4))
    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, stencil="one-sided", retries=2)
    with pytest.raises(SolverError, match="3 times"):
        network.loss(z).backward()


def test_a_fault_in_the_free_phase(network):
    with pytest.raises(SolverError, match=r"free phase.*shape="):
        tep.attach_equilibrium(Faulty(network, raises, (1,)), network.force, network.theta, network.x)


def test_a_subprocess_that_times_out_by_itself(network):
    def solve(current):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(9)"], timeout=0.1, check=True)

    with pytest.raises(SolverTimeoutError):
        tep.attach_equilibrium(solve, network.force, network.theta, network.x)


@pytest.mark.parametrize("fault", ["raises", "hangs", "nan", "dies"])
def test_faults_in_a_process(network, fault):
    def solve(current):  # the count of calls would not come back from the process
        z = network.solve(current)
        if not current.dim():
            return z
        if fault == "dies":
            sys.exit(7)
        return FAULTS[fault][0](z)

    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, executor="process", timeout=2)
    kind, words = (SolverError, "exit code 7") if fault == "dies" else (FAULTS[fault][1], "nudge")
    with pytest.raises(kind, match=words):
        network.loss(z).backward()


@pytest.mark.parametrize("executor", ["thread", "process", "own"])
def test_concurrent_solves_give_the_same_gradient(network, executor):
    options = {"stencil": tep.Stencil.richardson(0.1), "repeats": 2}
    expected = network.gradients(**options)[0]
    own = ThreadPoolExecutor(2)
    gradient = network.gradients(executor=own if executor == "own" else executor, workers=2, **options)[0]
    own.shutdown()
    assert torch.allclose(gradient, expected, rtol=1e-12)


def test_solves_overlap(network):
    barrier = threading.Barrier(4, timeout=5)

    def solve(current):
        if current.dim():
            barrier.wait()  # passes only if all four nudged solves are under way
        return network.solve(current)

    z = tep.attach_equilibrium(
        solve, network.force, network.theta, network.x, stencil="richardson", executor="thread", workers=4
    )
    network.loss(z).backward()


def test_a_hanging_thread_does_not_keep_the_interpreter(tmp_path):
    code = """
import time, torch, torchdeq_ep as tep
try:
    theta = torch.ones(2, requires_grad=True)
    tep.attach_equilibrium(lambda current: time.sleep(60), lambda z, t, x: t - z, theta, timeout=0.1)
except tep.errors.SolverTimeoutError as error:
    print("named", error.nudge)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "named 0.0\n"
