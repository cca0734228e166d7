"""A packed state is the state, whatever it is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchdeq_ep as tep
from torchdeq_ep.errors import MapContractError
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


def nested(*tensors):
    return torch.nested.nested_tensor(list(tensors), layout=torch.jagged)


NO_STATES = {
    "an empty tuple": (),
    "an empty list": [],
    "NoneType": None,
    "float": 3.0,
    "dict": {"z": torch.zeros(2)},
    "ndarray": np.zeros(2),
    "generator": (torch.zeros(2) for _ in range(2)),
    "a tuple with tuple in it": ((torch.zeros(2),), torch.zeros(2)),
    "not torch.int64": torch.zeros(2, dtype=torch.int64),
    "not torch.float8": torch.zeros(2).to(torch.float8_e4m3fn),
    "sparse_coo.*to_dense": torch.eye(3).to_sparse(),
    "nested.*pad it": nested(torch.ones(2), torch.ones(3)),
    "one device": (torch.zeros(2), torch.zeros(2, device="meta")),
}


@pytest.mark.parametrize("message", NO_STATES)
def test_what_is_no_state_is_named_wherever_a_state_is_taken(message):
    state = NO_STATES[message]
    weight = torch.tensor(0.5, requires_grad=True)

    def f(*state):
        return [weight * tensor for tensor in state]

    def without_autograd(f, state):
        with torch.no_grad():
            tep.attach(f, state)

    taken = (
        tep.attach,
        without_autograd,
        tep.jacobian.symmetry_score,
        tep.jacobian.spectral_radius,
        tep.jacobian.field_of_values,
        tep.jacobian.automatic_metric,
        lambda f, state: tep.get_backward("ep")(f, state, state),
        lambda f, state: tep.get_backward("ift")(f, state, state),
    )
    for function in taken:
        with pytest.raises(MapContractError, match=message):
            function(f, state)


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), nested(torch.ones(2), torch.ones(3))])
def test_a_map_may_not_return_what_is_not_dense(value):
    with pytest.raises(MapContractError, match=r"f returned a tensor .* dense"):
        tep.attach(lambda z: value, torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_states_of_few_entries_have_spectrum_and_symmetry(shape):
    z = torch.zeros(shape)
    size = 0.5 if z.numel() else 0.0
    assert tep.jacobian.spectral_radius(lambda z: 0.5 * z, z) == pytest.approx(size)
    assert tep.jacobian.field_of_values(lambda z: 0.5 * z, z).real_max == pytest.approx(size)
    assert tep.jacobian.symmetry_score(lambda z: 0.5 * z, z) == 1.0
