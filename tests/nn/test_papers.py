"""The papers' own method, written plainly, beside the package's: equal where both converge, at every amplitude."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from papers import FREE_STEPS, NUDGED_STEPS, Papers, sigmoid
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.nn import VectorFieldMLP
from torchdeq_ep.state import Equilibrium

SAMPLES = 5
STENCILS = {
    "uphill": (lambda beta: tep.Stencil.one_sided(beta, "up"), 1),
    "symmetric": (tep.Stencil.symmetric, 2),
    "four points": (lambda beta: tep.Stencil.contour(beta, 4), 4),
    "six points": (lambda beta: tep.Stencil.contour(beta, 6), 6),
}

pytestmark = pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.EPWarning")


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def network(damping: float, angle: float = 0.0, gain: float = 0.5) -> VectorFieldMLP:
    torch.manual_seed(0)
    sizes = {"in": 8, "l1": 9, "l2": 7, "l3": 4, "out": 3}
    options = {"f_tol": 1e-13, "f_max_iter": 1000}
    return VectorFieldMLP(sizes, readout="softmax", damping=damping, angle=angle, gain=gain, **options)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(SAMPLES, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])


def papers(angle: float = 0.0, free_steps: int = 500, nudged_steps: int = 500) -> Papers:
    return Papers(network(0.0, angle), *batch(), free_steps, nudged_steps)


def ours(stencil: tep.Stencil | None, damping: float, angle: float = 0.0) -> dict[str, Tensor]:
    """Gradients of the mean loss; `beta` multiplies the gradient of each sample's own."""
    model, (x, labels) = network(damping, angle), batch()
    options: dict[str, Any] = {"metric": model.nudge_metric, "tol": 1e-11, "max_iter": 1000, "on_divergence": "raise"}
    mode = (
        tep.InfinitesimalEP(**options)
        if stencil is None
        else tep.EquilibriumPropagation(stencil.at(stencil.beta * SAMPLES), scale="absolute", **options)  # type: ignore[operator]
    )
    with tep.use_backward(model, mode):
        loss = model.loss(model(x), labels)
        with tep.nudge_loss(model, model.loss_of_state(labels)):
            loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    difference = math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))
    return difference / math.sqrt(sum(float(value.square().sum()) for value in other.values()))


@pytest.mark.parametrize(
    ("damping", "angle"),
    [(0.5, 90.0), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(0.0, 0.0), (0.5, 0.0), (0.0, 90.0)])],
)
def test_the_limit_of_small_nudges_is_the_same(damping: float, angle: float) -> None:
    assert distance(ours(None, damping, angle), papers(angle).gradient(0.0, n_points=0)) < 1e-8


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_nudged_states_are_the_same_at_every_amplitude(damping: float, beta: float, direction: str) -> None:
    peer, model = papers(), network(damping)
    free, (x, labels) = peer.free(), batch()
    signed = beta if direction == "up" else -beta
    with torch.no_grad():
        expected = peer.settle(free, signed, 500)
    f = model.map(x)
    point = free.clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(model.loss(model.read_out(point), labels), point)
    equilibrium = Equilibrium(f, free, f(free).detach(), cotangent, 1e-15, loss_of_state=model.loss_of_state(labels))
    stencil = tep.Stencil.one_sided(beta * SAMPLES, direction)  # type: ignore[arg-type]
    options: dict[str, Any] = {"scale": "absolute", "tol": 1e-12, "max_iter": 1000, "metric": model.nudge_metric}
    v, _ = tep.EquilibriumPropagation(stencil, **options).solve(equilibrium)
    found = free + signed * SAMPLES * model.nudge_metric(free) * v
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert float((expected - free).norm()) > 0.01 * beta


@pytest.mark.parametrize("name", STENCILS)
def test_what_is_read_out_differs_by_the_order_of_the_stencil(name: str) -> None:
    """They take the change of activities, and we that of potentials times the slope: equal as the nudge gets small."""
    stencil, n_points = STENCILS[name]
    betas = (0.4, 0.2) if n_points == 6 else (0.1, 0.05)
    found = [distance(ours(stencil(beta), 0.5), papers().gradient(beta, n_points)) for beta in betas]
    assert math.log2(found[0] / found[1]) == pytest.approx(n_points, abs=0.35)
    assert found[1] > 1e-11


def test_their_numbers_of_steps_come_close() -> None:
    exact = papers().gradient(0.05, 2)
    theirs = distance(papers(free_steps=FREE_STEPS, nudged_steps=NUDGED_STEPS).gradient(0.05, 2), exact)
    more = distance(papers(free_steps=FREE_STEPS, nudged_steps=2 * NUDGED_STEPS).gradient(0.05, 2), exact)
    assert more < 0.1 * theirs
    assert theirs < 0.05


def test_the_activation_is_the_packages() -> None:
    u = torch.linspace(-2, 3, 30)
    torch.testing.assert_close(sigmoid(u), tep.nn.shifted_sigmoid(u))
