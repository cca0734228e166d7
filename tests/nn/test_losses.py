"""Losses that know their gradient: beside autograd's, at real and complex states, and in a nudge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchdeq
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, LossMismatchWarning
from torchdeq_ep.modes.force import loss_force
from torchdeq_ep.modes.nudged_map import UnitsForce
from torchdeq_ep.nn import (
    ReadoutLoss,
    VectorFieldCNN,
    VectorFieldMLP,
    dsilu,
    shifted_dsilu,
    shifted_sigmoid,
)
from torchdeq_ep.nn.vector_field.base import VectorField
from torchdeq_ep.state import Equilibrium

LABELS = torch.tensor([0, 2, 1, 1])
UNITS = slice(3, 9)
TARGETS = {
    "labels": LABELS,
    "one ignored": torch.tensor([0, -100, 1, 1]),
    "probabilities": torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 1).double(),
    "shares": torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).double(),  # that do not sum to 1
}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def by_autograd(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The holomorphic derivative, of which autograd's is the conjugate."""
    point = z.detach().requires_grad_()
    with tep.holomorphic.mode() if z.is_complex() else torch.enable_grad():
        value = loss(point)
    (gradient,) = torch.autograd.grad(value, point, torch.ones_like(value))
    return gradient.conj().resolve_conj() if z.is_complex() else gradient


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("phi", [None, shifted_sigmoid, dsilu, shifted_dsilu, torch.tanh, torch.sigmoid])
@pytest.mark.parametrize("target", [*TARGETS, "values"])
@pytest.mark.parametrize("has_weight", [False, True])
def test_gradient_is_that_of_autograd(
    is_complex: bool, phi: Callable[[Tensor], Tensor] | None, target: str, has_weight: bool
) -> None:
    weight, bias = (torch.randn(3, 6), torch.randn(3)) if has_weight else (None, None)
    units = UNITS if has_weight else slice(3, 6)
    kind = "squared-error" if target == "values" else "cross-entropy"
    loss = ReadoutLoss(kind, torch.randn(4, 3) if target == "values" else TARGETS[target], units, phi, weight, bias)
    z = torch.randn(4, 10)
    z = torch.complex(z, 0.3 * torch.randn(4, 10)) if is_complex else z
    expected = by_autograd(loss, z)
    assert not bool(expected[:, :3].any())
    torch.testing.assert_close(loss.gradient(z[:, units]), expected[:, units], rtol=1e-12, atol=1e-14)
    stack = torch.stack((z, z + 0.1))
    torch.testing.assert_close(loss.gradient(stack[..., units])[0], expected[:, units], rtol=1e-12, atol=1e-14)


def test_loss_is_the_one_written_out() -> None:
    head, z = nn.Linear(6, 3), torch.randn(4, 10)
    options = {"units": UNITS, "phi": torch.tanh, "weight": head.weight, "bias": head.bias}
    logits = head(torch.tanh(z[:, UNITS]))
    torch.testing.assert_close(
        ReadoutLoss("cross-entropy", LABELS, **options)(z), functional.cross_entropy(logits, LABELS)
    )
    target = torch.randn(4, 3)
    squares = ((logits - target) ** 2).sum() / 2 / 4
    torch.testing.assert_close(ReadoutLoss("squared-error", target, **options)(z), squares)
    assert not ReadoutLoss("cross-entropy", LABELS, **options).gradient(z[:, UNITS]).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hinge"}, "kind"),
        ({"phi": torch.sin}, "closed form"),
        ({"kind": "squared-error"}, "made of values"),
        ({"weight": torch.zeros(3)}, "shape"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_impossible_losses_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        ReadoutLoss(**({"kind": "cross-entropy", "target": LABELS} | options))  # type: ignore[arg-type]


def networks() -> dict[str, VectorField]:
    sizes = {"in": 5, "l1": 7, "l2": 6, "out": 3}
    two = ["in-l1", "l1-l2", "l2-l1", "l1-out", "l2-out"]
    return {
        "mse": VectorFieldMLP(sizes, feedback=0.5, damping=0.25),
        "softmax": VectorFieldMLP(sizes, readout="softmax", phi=shifted_dsilu),
        "two sources": VectorFieldMLP(sizes, two, readout="softmax", feedback=0.5),
        "apart": VectorFieldMLP(
            {"in": 5, "l1": 7, "l2": 6, "l3": 2, "out": 3},
            ["in-l1", "l1-l2", "l2-l3", "l3-out", "l1-out"],
            readout="softmax",
        ),
        "cnn": VectorFieldCNN((1, 8, 8), (3, 4), 3),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("imaginary", [0.0, 0.3])
@pytest.mark.parametrize("metric", ["nudge_metric", "function", "fixed", None])
def test_force_of_a_network_is_that_of_its_loss_by_autograd(name: str, imaginary: float, metric: str | None) -> None:
    model = networks()[name]
    u = torch.randn(4, model.state_size)
    value = u + 0.01 * torch.randn_like(u)  # the free phase stopped early

    def plain(z: Tensor) -> Tensor:
        return model.loss(model.read_out(z), LABELS)

    known = model.loss_of_state(LABELS)
    assert isinstance(known, ReadoutLoss)
    torch.testing.assert_close(known(u), plain(u))
    cotangent = 2 * torch.func.grad(plain)(value).detach()
    chosen = {"nudge_metric": model.nudge_metric, "function": lambda z: 1 + z**2, "fixed": "auto", None: None}[metric]
    diagonal = None if chosen is None else torch.rand_like(u) + 0.5 if chosen == "auto" else chosen(u)
    point = torch.complex(u, imaginary * torch.randn_like(u)) if imaginary else u + 0.1
    forces = []
    for loss in (known, plain):
        free = Equilibrium(lambda z: z, u, value, cotangent, 1e-15, loss_of_state=loss)
        force, mismatch = loss_force(free, chosen, diagonal, "real-part")
        assert mismatch < 1e-12
        forces.append(force(point))
    assert isinstance(
        loss_force(Equilibrium(lambda z: z, u, value, cotangent, 1e-15, loss_of_state=known), chosen, diagonal)[0],
        UnitsForce,
    )
    torch.testing.assert_close(*forces, rtol=1e-10, atol=1e-12)


def test_a_network_whose_activation_is_not_known_takes_autograd() -> None:
    model = VectorFieldMLP({"in": 5, "l1": 7, "out": 3}, phi=torch.atan)
    loss = model.loss_of_state(LABELS)
    assert not isinstance(loss, ReadoutLoss)
    u = torch.randn(4, model.state_size)
    torch.testing.assert_close(loss(u), model.loss(model.read_out(u), LABELS))


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("backward", ["ep:beta=0.3", "ep-one-sided:direction=up,beta=0.3", "hep:beta=0.3"])
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_gradients_of_a_nudged_layer_are_those_of_the_loss_as_a_function(
    core: str, backward: str, batching: str
) -> None:
    weight, drive, head = 0.3 * torch.randn(9, 9), torch.randn(4, 9), nn.Linear(6, 3)
    loss = ReadoutLoss("cross-entropy", LABELS, UNITS, torch.tanh, head.weight, head.bias)
    calls = []

    def written_out(z: Tensor) -> Tensor:
        calls.append(z)
        return functional.cross_entropy(head(torch.tanh(z[:, UNITS])), LABELS)

    def gradient(loss_of_state: Callable[..., Tensor]) -> Tensor:
        x = drive.clone().requires_grad_()
        deq = torchdeq.get_deq(core=core, f_tol=1e-12, f_max_iter=200)
        with tep.use_backward(deq, backward, tol=1e-10, batching=batching, scale="absolute"):
            states, _ = deq(lambda z: torch.tanh(z @ weight.T + x), torch.zeros(4, 9))
            with tep.nudge_loss(deq, loss_of_state):
                (found,) = torch.autograd.grad(written_out(states[-1]), x)
        return found

    calls.clear()
    found = gradient(loss)
    assert len(calls) == 1  # of the loss that is differentiated
    torch.testing.assert_close(found, gradient(written_out), rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
def test_a_state_that_is_no_matrix_takes_the_same_loss() -> None:
    weight, drive = 0.3 * torch.randn(5, 5), torch.randn(4, 3, 5)
    loss = ReadoutLoss("squared-error", torch.randn(4, 3, 2), slice(1, 3), torch.tanh)
    gradients = []
    for loss_of_state in (loss, lambda z: loss(z)):
        x = drive.clone().requires_grad_()
        deq = torchdeq.get_deq(f_tol=1e-12, f_max_iter=200)
        with tep.use_backward(deq, "ep:beta=0.3", tol=1e-10):
            states, _ = deq(lambda z, x=x: torch.tanh(z @ weight.T + x), torch.zeros(4, 3, 5))
            with tep.nudge_loss(deq, loss_of_state):
                gradients += torch.autograd.grad(loss(states[-1]), x)
    torch.testing.assert_close(*gradients)


def test_another_loss_than_the_one_that_is_differentiated_is_noticed() -> None:
    z = torch.zeros(4, 10)
    loss = ReadoutLoss("cross-entropy", LABELS, slice(0, 3))
    free = Equilibrium(lambda z: 0.5 * z, z, z, torch.randn(4, 10), 1e-15, loss_of_state=loss)
    with pytest.warns(LossMismatchWarning, match="another gradient"):
        tep.EquilibriumPropagation(tep.Stencil.symmetric(1e-3)).solve(free)
