"""Vector-field networks: weights, wiring, and what follows for the bias of equilibrium propagation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.holomorphic.context import holomorphic_map
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.modes.force import loss_force
from torchdeq_ep.nn import VectorFieldCNN, VectorFieldMLP, dsilu, shifted_sigmoid, softmax_pool
from torchdeq_ep.nn.activations import slope
from torchdeq_ep.state.equilibrium import Equilibrium

SIZES = {"in": 5, "l1": 7, "l2": 6, "out": 3}
TIGHT = {"f_tol": 1e-12, "f_max_iter": 500}
Network = VectorFieldMLP | VectorFieldCNN


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def cnn(**options: object) -> VectorFieldCNN:
    return VectorFieldCNN((1, 8, 8), (3, 4), 3, **(TIGHT | options))  # type: ignore[arg-type]


def equilibrium(model: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        f, u = model.map(x), model.initial_state(len(x))
        for _ in range(500):
            u = f(u)
    return u


@pytest.mark.parametrize("degrees", [0.0, 45.0, 90.0])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_every_reciprocal_pair_starts_at_the_angle(kind: str, degrees: float) -> None:
    model: Network = VectorFieldMLP(SIZES, angle=degrees) if kind == "mlp" else cnn(angle=degrees)
    assert set(model.connection_angles()) == ({"l1-l2", "l2-out"} if kind == "mlp" else {"l1-l2"})
    assert list(model.connection_angles().values()) == pytest.approx([degrees] * len(model.connection_angles()))


@pytest.mark.parametrize("degrees", [0.0, 30.0])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_networks_without_memory_have_the_shapes_of_others(kind: str, degrees: float) -> None:
    def build() -> Network:
        return VectorFieldMLP(SIZES, angle=degrees) if kind == "mlp" else cnn(angle=degrees)

    with torch.device("meta"):
        empty = build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(build().state_dict())


@pytest.mark.parametrize(("nominal", "actual"), [(0.0, 0.0), (15.0, 54.0), (30.0, 71.0), (45.0, 79.0), (90.0, 90.0)])
def test_backward_weights_of_the_papers_have_the_norm_of_their_own_fan_in(nominal: float, actual: float) -> None:
    """`rotate` of the papers' code: `sin(a) own + cos(a) forward.T`, and `own` comes from ten units."""
    sizes = {"in": 5, "l1": 256, "l2": 256, "l3": 10, "out": 10}
    torch.manual_seed(0)
    model = VectorFieldMLP(sizes, angle=nominal, gain=0.5, backward_norm="fan-in", readout="softmax")
    angles = model.connection_angles()
    assert angles["l2-l3"] == pytest.approx(actual, abs=1.0)
    assert angles["l1-l2"] == pytest.approx(nominal, abs=0.3)  # of equal fan-in
    if nominal == 90.0:
        assert float(model.weights["l3-l2"].detach().std()) == pytest.approx(0.5 / 10**0.5, rel=0.05)
    torch.manual_seed(0)
    usual = VectorFieldMLP(sizes, angle=nominal, gain=0.5, readout="softmax")
    assert usual.connection_angles()["l2-l3"] == pytest.approx(nominal, abs=1e-3)
    assert all(torch.equal(usual.weights[key], model.weights[key]) for key in ("in-l1", "l1-l2", "l2-l3", "l3-out"))


def test_map_is_that_of_the_connections_written_out() -> None:
    model = VectorFieldMLP(SIZES, ["in-l1", "in-out", "l1-l2", "l2-out", "out-l1", "l2-l2"], damping=0.25)
    x, u = torch.randn(4, 5), torch.randn(4, 16)
    with torch.no_grad():
        for bias in model.biases.values():
            bias.normal_()
    w, b = model.weights, model.biases
    s1, s2, s3 = model.phi(u).split([7, 6, 3], dim=1)
    fields = (
        x @ w["in-l1"].T + s3 @ w["out-l1"].T + b["l1"],
        s1 @ w["l1-l2"].T + s2 @ w["l2-l2"].T + b["l2"],
        x @ w["in-out"].T + s2 @ w["l2-out"].T + b["out"],
    )
    torch.testing.assert_close(model.map(x)(u), 0.25 * u + 0.75 * torch.cat(fields, dim=1))


def test_loop_network_has_no_reciprocal_pair_and_learns() -> None:
    model = VectorFieldMLP(SIZES, ["in-l1", "l1-l2", "l2-out", "out-l1"], **TIGHT)
    weight = model.dense_weight().detach()
    assert model.connection_angles() == {}
    assert float((weight * weight.T).abs().sum()) == 0
    with tep.use_backward(model, "aep", tol=1e-8):
        model.loss(model(torch.randn(4, 5)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("readout", ["mse", "softmax"])
def test_readout_decides_whether_the_output_is_in_the_state(readout: str) -> None:
    model = VectorFieldMLP(SIZES, readout=readout, **TIGHT)  # type: ignore[arg-type]
    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    assert model.state_size == (16 if readout == "mse" else 13)
    assert model.initial_state(4).shape == (4, model.state_size)
    logits = model(x)
    assert logits.shape == (4, 3)
    torch.testing.assert_close(logits, model.read_out(equilibrium(model, x)), rtol=1e-8, atol=1e-8)
    expected = (
        torch.nn.functional.cross_entropy(logits, labels)
        if readout == "softmax"
        else torch.nn.functional.mse_loss(logits, torch.eye(3)[labels]) * 3 / 2
    )
    torch.testing.assert_close(model.loss(logits, labels), expected)


@pytest.mark.parametrize("kind", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_metric_makes_ep_exact_at_zero_degrees_and_only_there(kind: str) -> None:
    def error(degrees: float, with_metric: bool) -> float:
        model: Network = VectorFieldMLP(SIZES, angle=degrees, gain=1.0) if kind == "mlp" else cnn(angle=degrees)
        x = 0.3 * torch.randn(2, 5) if kind == "mlp" else torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            f, u = model.map(x), equilibrium(model, x)
        cotangent = torch.randn_like(u)
        metric = model.metric if with_metric else None
        found = tep.InfinitesimalEP(metric=metric, tol=1e-10)(f, u, cotangent)
        exact = tep.ImplicitDifferentiation(tol=1e-10)(f, u, cotangent)
        return float((found - exact).norm() / exact.norm())

    assert error(0.0, with_metric=True) < 1e-7
    assert error(0.0, with_metric=False) > 1e-3
    assert error(90.0, with_metric=True) > 1e-3


def test_metric_where_the_activation_falls_has_its_steepness() -> None:
    model = VectorFieldMLP({"in": 2, "l1": 6, "l2": 5, "out": 2}, phi=dsilu, damping=0.0, gain=1.0)
    u = torch.linspace(-4, 4, 13)[None]
    slopes = torch.func.jvp(dsilu, (u,), (torch.ones_like(u),))[1]
    assert bool((slopes < -1e-3).any())
    torch.testing.assert_close(model.metric(u), 1 / slopes.abs())
    # The product is then that of the weights, but for signs, and homeostasis is not led by the falling units.
    product = dense_jacobian(model.map(torch.zeros(1, 2)), u) * model.metric(u)
    torch.testing.assert_close(product.abs(), model.dense_weight().detach().abs())


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
@pytest.mark.parametrize("backward", ["ep-one-sided", "hep"])
def test_an_absolute_nudge_means_the_same_whatever_the_damping(backward: str) -> None:
    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    gradients = []
    for damping in (0.0, 0.5):
        torch.manual_seed(1)
        model = VectorFieldMLP(SIZES, damping=damping, **TIGHT)
        with tep.use_backward(model, backward, beta=1.0, scale="absolute", metric=model.nudge_metric, tol=1e-10):
            model.loss(model(x), labels).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("phi", [shifted_sigmoid, dsilu, torch.tanh])
@pytest.mark.parametrize("imaginary", [0.0, 0.6])
def test_nudge_metric_turns_the_gradient_in_potentials_into_that_in_activities(
    phi: Callable[[Tensor], Tensor], imaginary: float
) -> None:
    # Of saturated units and at complex potentials too, where 1 / |phi'| bounded by a number would be off by half.
    model = VectorFieldMLP(SIZES, phi=phi, damping=0.25)
    u = torch.linspace(-4, 4, 32).reshape(2, 16) * (1 + 0j)
    u = u + 1j * imaginary * torch.rand(2, 16) if imaginary else u.real
    weight, slopes = torch.randn(2, 16), slope(phi, u.real)
    state = u.real
    free = Equilibrium(
        lambda z: z, state, state, weight * slopes, 1e-16, loss_of_state=lambda z: (weight * model.phi(z)).sum()
    )
    force, _ = loss_force(free, model.nudge_metric, model.nudge_metric(state), "real-part")
    expected = 0.75 * weight * slopes.sign()
    torch.testing.assert_close(force(u), expected.to(u.dtype), rtol=1e-6, atol=1e-9)


def test_metric_at_complex_potentials_is_continued_from_the_real_part() -> None:
    model = VectorFieldMLP(SIZES)
    u = torch.cat([torch.linspace(-1, 2, 15), torch.tensor([9.0])])[None] + 0.6j  # the last one is flat
    difference = (shifted_sigmoid(u + 1e-5) - shifted_sigmoid(u - 1e-5)) / 2e-5
    assert bool((difference.real < -1e-3).any())
    metric = holomorphic_map(model.metric, "real-part")(u)
    torch.testing.assert_close(metric[:, :-1], 1 / difference[:, :-1], rtol=1e-6, atol=1e-6)
    assert metric[0, -1].item() == pytest.approx(1e4)


def test_nudge_metric_of_a_saturated_unit_does_not_blow_up_what_rounding_left_of_its_gradient() -> None:
    # The gradient may be taken a step away from the state at which the slope is zero in single precision.
    model = VectorFieldMLP(SIZES, damping=0.5)
    u = torch.full((1, 16), 9.0, dtype=torch.float32)
    smallest = 4 * torch.finfo(torch.float32).eps / 2  # slope of the next activity below 1
    assert float(slope(shifted_sigmoid, u).max()) == 0
    assert float((smallest * model.nudge_metric(u)).max()) <= 1


def test_metric_takes_scaled_backward_weights_for_symmetric() -> None:
    model = VectorFieldMLP(SIZES, feedback=0.3, damping=0.0)
    with torch.no_grad():
        for backward in ("l2-l1", "out-l2"):
            model.weights[backward] *= 0.3
        f = model.map(torch.randn(1, 5))
    u = torch.randn(1, 16)
    product = dense_jacobian(f, u) * model.metric(u)
    torch.testing.assert_close(product, product.T)
    assert model.connection_angles() == {"l1-l2": 0.0, "l2-out": 0.0}


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_every_solver_of_torchdeq_finds_the_equilibrium(solver: str) -> None:
    options = {"f_tol": 1e-9, "f_max_iter": 100, "f_solver": solver}
    model = VectorFieldMLP(SIZES, angle=90.0, damping=0.0, **options)
    x = torch.randn(3, 5)
    torch.testing.assert_close(model(x), model.read_out(equilibrium(model, x)), rtol=1e-5, atol=1e-6)


def test_holomorphic_nudge_reaches_the_real_one() -> None:
    model = VectorFieldMLP(SIZES, angle=90.0)
    x = torch.randn(3, 5)
    with torch.no_grad():
        f, u = model.map(x), equilibrium(model, x)
    cotangent = torch.randn_like(u)

    def continued(z: Tensor) -> Tensor:
        with tep.holomorphic.mode():
            return f(z)

    holomorphic = tep.get_backward("hep:n_points=6", tol=1e-9)(continued, u, cotangent)
    torch.testing.assert_close(holomorphic, tep.InfinitesimalEP(tol=1e-10)(f, u, cotangent), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connections": ["in-l1", "l1-l3"]}, "unknown layer 'l3'"),
        ({"connections": ["in-l1", "l1l2"]}, "source-target"),
        ({"connections": ["in-l1", "l1-in"]}, "input is not part"),
        ({"connections": ["in-l1", "l1-l2"]}, "leads to 'out'"),
        ({"connections": ["l1-out", "l1-out"]}, "twice"),
        ({"connections": ["l1-out", "out-l1"], "readout": "softmax"}, "outside the state"),
        ({"readout": "hinge"}, "unknown value of readout"),
        ({"damping": 1.0}, "damping"),
        ({"gain": 0.0}, "gain"),
        ({"gain": float("inf")}, "gain"),
        ({"feedback": 0.0}, "feedback"),
        ({"backward_norm": "equal"}, "backward_norm"),
        ({"feedback": float("inf")}, "feedback"),
        ({"sizes": {"in": 5, "l1": 1, "out": 1}, "angle": 30.0}, "'out-l1' .* single number"),
        ({"angle": 120.0}, "angle"),
        ({"sizes": {"in": 5, "out": 3}}, "at least one hidden"),
        ({"sizes": {"in": 5, "l1": 0, "out": 3}}, "at least 1"),
        ({"sizes": {"in": 5, "l-1": 4, "out": 3}}, "must not contain"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(tep.errors.InvalidOptionError, match=message):
        VectorFieldMLP(**({"sizes": SIZES} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "must be odd"),
        ({"kernel_size": 0}, "at least 1"),
        ({"kernel_size": 3.0}, "whole number"),
        ({"channels": (4, 4, 4, 4)}, "cannot be halved"),
        ({"channels": ()}, "cannot be halved"),
        ({"channels": (), "last_padding": "valid"}, "cannot be halved"),
        ({"channels": (4, 4, 4), "last_padding": "valid"}, "not padded"),
        ({"channels": (4, 4), "kernel_size": 5, "last_padding": "valid"}, "not padded"),
        ({"channels": (4, 4), "last_padding": "full"}, "last_padding"),
        ({"image": (1, 10, 8), "channels": (4, 4), "last_padding": "valid"}, "cannot be halved"),
        ({"channels": (4, 0)}, "'l2'"),
        ({"image": (0, 8, 8)}, "channels of an image"),
        ({"image": (1, 0, 8)}, "height of an image"),
        ({"n_classes": 0}, "n_classes"),
        ({"channels": (1, 1), "kernel_size": 1, "angle": 90.0}, "from 'l2' to 'l1' .* single number"),
    ],
)
def test_impossible_convolutional_networks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(tep.errors.InvalidOptionError, match=message):
        VectorFieldCNN(**({"image": (1, 8, 8)} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("angle", [0.0, 45.0, 90.0])
def test_the_smallest_networks_have_finite_weights_at_the_angle_asked_for(angle: float) -> None:
    small = [
        VectorFieldMLP({"in": 1, "l1": 1, "out": 2}, angle=angle),
        VectorFieldMLP({"in": 1, "l1": 2, "out": 1}, angle=angle),
        VectorFieldMLP({"in": 1, "l1": 1, "out": 1}, ["in-l1", "l1-out", "l1-l1"], angle=angle),
        VectorFieldMLP({"in": 1, "l1": 1, "out": 1}, angle=angle, readout="softmax"),
        VectorFieldCNN((1, 4, 4), (1, 2), 1, angle=angle, kernel_size=1),
    ]
    for model in small:
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        assert all(found == pytest.approx(angle, abs=1e-3) for found in model.connection_angles().values())
    one = VectorFieldMLP({"in": 1, "l1": 1, "out": 1})
    assert one.connection_angles() == {"l1-out": 0.0}


@pytest.mark.parametrize("last_padding", ["same", "valid"])
def test_map_of_a_cnn_is_that_of_its_layers_written_out(last_padding: str) -> None:
    options = {"angle": 60.0, "damping": 0.25, "temperature": 0.7, "last_padding": last_padding}
    model = VectorFieldCNN((2, 16, 16), (3, 4, 5), 3, **options)  # type: ignore[arg-type]
    x, u = torch.randn(2, 2, 16, 16), torch.randn(2, model.state_size)
    assert model.shapes[-1] == ((5, 2, 2) if last_padding == "same" else (5, 1, 1))
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_()
    forward, backward = list(model.forward_weights), list(model.backward_weights)
    activities = model.unpack(model.phi(u))
    assert [tuple(layer.shape[1:]) for layer in activities] == model.shapes

    pads = [1, 1, 1 if last_padding == "same" else 0]

    def path(s: Tensor, weight: Tensor, padding: int) -> Tensor:
        return softmax_pool(torch.nn.functional.conv2d(s, weight, padding=padding), 2, temperature=0.7)

    layers = zip([x, *activities[:2]], forward, model.biases, pads, strict=True)
    fields = [path(s, w, padding) + b for s, w, b, padding in layers]
    for k, weight in enumerate(backward):
        top_down = torch.func.vjp(lambda s, w=weight, p=pads[k + 1]: path(s, w, p), activities[k])[1]
        fields[k] = fields[k] + top_down(activities[k + 1])[0]
    potentials = model.unpack(u)
    for value, potential, field in zip(model.unpack(model.map(x)(u)), potentials, fields, strict=True):
        torch.testing.assert_close(value, 0.25 * potential + 0.75 * field)


def test_head_of_a_cnn_starts_as_lecuns_with_no_bias() -> None:
    head = VectorFieldCNN((1, 16, 16), (8, 16), 200).head
    assert head.in_features == 256
    assert float(head.weight.detach().std()) == pytest.approx(1 / 16, rel=0.05)
    assert not bool(head.bias.any())


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_holomorphic_nudge_of_a_cnn_reaches_the_real_one(batching: str) -> None:
    model = cnn(angle=60.0, phi=dsilu, gain=1.0)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        f, u = model.map(x), equilibrium(model, x)
    cotangent = torch.randn_like(u)
    holomorphic = tep.get_backward("hep:n_points=6", tol=1e-9, batching=batching)(f, u, cotangent)
    torch.testing.assert_close(holomorphic, tep.InfinitesimalEP(tol=1e-10)(f, u, cotangent), rtol=1e-5, atol=1e-7)


def test_cnn_learns_by_ep_with_gradients_for_every_parameter() -> None:
    model = cnn(angle=90.0)
    with tep.use_backward(model, tep.EquilibriumPropagation(metric=model.metric)):
        model.loss(model(torch.randn(2, 1, 8, 8)), torch.tensor([0, 2])).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
