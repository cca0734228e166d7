"""Where samples lie in a packed state, and whether each has its value to itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from torchdeq_ep.state import Packing, Rows, are_independent


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=3),
    st.integers(1, 2),
    st.booleans(),
)
def test_rows_are_those_of_the_samples(count, parts, stack, pairs):
    tensors = tuple(
        torch.randn(count, width, 2, dtype=torch.complex64 if is_complex else torch.float32)
        for width, is_complex in parts
    )
    packing = Packing.of(tensors if len(tensors) > 1 else tensors[0])
    packed = torch.stack([packing.pack(tensors if len(tensors) > 1 else tensors[0])] * stack)
    packed = torch.stack([packed, -packed], dim=-1) if pairs else packed
    rows = packing.rows
    matrix = rows.split(packed)
    assert len(matrix) == stack * count
    torch.testing.assert_close(rows.join(matrix, packed), packed)
    for sample in range(count):  # nothing else than this sample's entries stands in its row
        alone = tuple(t * (torch.arange(count) == sample).reshape(-1, 1, 1) for t in tensors)
        one = packing.pack(alone if len(alone) > 1 else alone[0]).unsqueeze(0)
        others = [k for k in range(count) if k != sample]
        assert not rows.split(one)[others].any()


@pytest.mark.parametrize("state", [torch.zeros(()), torch.zeros(1, 3), (torch.zeros(2, 3), torch.zeros(3, 2))])
def test_states_without_samples_have_no_rows(state):
    assert Packing.of(state).rows is None


NORM = torch.nn.BatchNorm1d(6, track_running_stats=False)
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) / 3
KERNEL = torch.randn(1, 1, 3, 1, generator=torch.Generator().manual_seed(1))
TIES = torch.rand(40, 40, generator=torch.Generator().manual_seed(2)).softmax(1)
MAPS = {
    "dense": (lambda z: torch.tanh(z @ WEIGHT), True),
    "each row normed": (lambda z: functional.layer_norm(z, (6,)), True),
    "batch norm": (lambda z: torch.relu(NORM(z @ WEIGHT)), False),
    "graph": (lambda z: torch.tanh(TIES @ z @ WEIGHT), False),
    "attention over the batch": (
        lambda z: functional.scaled_dot_product_attention(z[None], z[None], z[None])[0],
        False,
    ),
    "time steps": (lambda z: functional.conv2d(z[None, None], KERNEL, padding=(1, 0))[0, 0], False),
    "the mean over the batch": (lambda z: z - z.mean(0), False),
    "one row read by all": (lambda z: torch.tanh(z + 1e-3 * z[7]), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_independence_is_found_right(name, dtype):
    f, expected = MAPS[name]
    if dtype == torch.bfloat16:
        if name not in ("dense", "batch norm", "graph"):
            pytest.skip("coupled by less than this dtype shows")
        g = f
        f = lambda z: g(z.float()).to(dtype)  # noqa: E731
    elif dtype == torch.float64:
        g = f
        f = lambda z: g(z.float()).double()  # noqa: E731
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert are_independent(f, z, f(z), Rows(40, (6,))) == expected


def test_a_wrong_half_is_not_decisive():
    calls = []

    def f(z):
        calls.append(z)
        return torch.tanh(z)

    z = torch.randn(8, 3)
    assert are_independent(f, z, torch.tanh(z), Rows(8, (3,)))
    assert len(calls) == 2
    moved = [(z != call).any(1) for call in calls]
    assert all(int(half.sum()) == 4 for half in moved)
