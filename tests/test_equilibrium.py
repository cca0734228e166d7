"""A packed state is the state, whatever it is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import OnceDifferentiableSine, PlainSine

from torchdeq_ep.errors import JacobianProductError, MapContractError
from torchdeq_ep.jacobian.linearization import dense_jacobian, jvp, vjp
from torchdeq_ep.state.calls import FrozenStatistics
from torchdeq_ep.state.packing import Packing

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128])
TENSORS = st.tuples(SHAPES, DTYPES).map(lambda pair: torch.randn(pair[0], dtype=pair[1]))
STATES = st.one_of(TENSORS, st.lists(TENSORS, min_size=1, max_size=4), st.lists(TENSORS, min_size=1).map(tuple))


@given(state=STATES)
def test_packing_round_trips(state):
    packing = Packing.of(state)
    packed = packing.pack(state)
    assert packed.is_floating_point()
    back = packing.unpack(packed)
    assert type(back) is type(state)
    pairs = [(back, state)] if isinstance(state, torch.Tensor) else list(zip(back, state, strict=True))
    for got, expected in pairs:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@given(state=STATES)
def test_packed_inner_products_are_those_of_pytorch_gradients(state):
    tensors = [state] if isinstance(state, torch.Tensor) else list(state)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    sum((leaf.abs() ** 2).sum() for leaf in leaves).backward()
    packing = Packing.of(tensors)
    gradient = packing.pack([leaf.grad for leaf in leaves])
    assert torch.allclose(gradient, 2 * packing.pack(tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", [(), [], "z", (torch.zeros(2), 1.0), torch.zeros(2, dtype=torch.int64)])
def test_what_is_no_state(state):
    with pytest.raises(MapContractError):
        Packing.of(state)


def test_autocast_lifts_coarse_states_and_restores_them():
    state = torch.randn(3, dtype=torch.bfloat16)
    packing = Packing.of(state, lenient=True)
    packed = packing.pack(state)
    assert packed.dtype == torch.float32
    assert torch.equal(packing.restore(packed, like=state), state)


def test_how_a_map_of_several_tensors_is_called():
    state = (torch.ones(2), torch.ones(3))
    packing = Packing.of(state)
    packed = packing.pack(state)

    def spread(a, b):
        return a + 1, b + 2

    def together(pair):
        return pair[0] + 1, pair[1] + 2

    def variadic(*tensors):
        return tensors[0] + 1, tensors[1] + 2

    def with_option(pair, tau=1.0):
        return pair[0] + tau, pair[1] + 2 * tau

    expected = torch.tensor([2.0, 2, 3, 3, 3])
    for f in (spread, together, variadic, with_option, torch.nn.Identity().forward and spread):
        assert torch.equal(packing.map(f)(packed), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.BatchNorm1d(3),
        torch.nn.BatchNorm1d(3, momentum=None),
        torch.nn.BatchNorm1d(3, affine=False),
        torch.nn.BatchNorm1d(3, track_running_stats=False),
        torch.nn.InstanceNorm1d(3, track_running_stats=True),
        torch.nn.GroupNorm(1, 3),
    ],
)
def test_frozen_statistics_change_no_result_and_no_buffer(layer, training):
    layer.train(training)
    x = torch.randn(4, 3, 5)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with FrozenStatistics() as guard:
        value = layer(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert guard.withheld == (training and bool(before))
    assert torch.equal(value, layer(x))


@pytest.mark.parametrize("operation", [torch.sin, PlainSine.apply])
def test_products_with_the_jacobian(operation):
    matrix = torch.randn(6, 6, dtype=torch.float64)

    def f(z):
        return (operation(z.flatten()) @ matrix.T).reshape(z.shape)

    z = torch.randn(2, 3, dtype=torch.float64)
    jacobian = matrix * z.flatten().cos()
    vector = torch.randn_like(z)
    assert torch.allclose(dense_jacobian(f, z, chunk_size=4), jacobian)
    assert torch.allclose(jvp(f, z)(vector).flatten(), jacobian @ vector.flatten())
    assert torch.allclose(vjp(f, z)(vector).flatten(), jacobian.T @ vector.flatten())
    assert not jvp(f, z)(vector).requires_grad


def test_products_of_a_constant_map_are_zero():
    z = torch.randn(3)
    for product in (jvp(lambda z: torch.ones(3), z), vjp(lambda z: torch.ones(3), z)):
        assert torch.equal(product(z), torch.zeros(3))


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_product_that_would_leave_out_a_part_is_refused(rest):
    z = torch.linspace(-1, 1, 4)
    with pytest.raises(JacobianProductError, match="no product J u"):
        jvp(lambda z: OnceDifferentiableSine.apply(z) + rest * z.cos(), z)(torch.ones(4))
