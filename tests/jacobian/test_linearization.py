"""Products with the Jacobian against the dense matrix."""

import pytest
import torch
from problems import AwkwardTanh, OnceDifferentiableSine, PlainSine, contraction, normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep.errors import JacobianProductError
from torchdeq_ep.jacobian.linearization import Linearization, dense_jacobian, jvp, vjp

VMAP_TAKES_GROUP_NORM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


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


@pytest.mark.parametrize(
    ("build", "batched"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), True),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), True),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.GroupNorm(2, 4), nn.Flatten()),
            VMAP_TAKES_GROUP_NORM,
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)), True),
    ],
)
def test_stacked_products_are_those_of_the_dense_jacobian(build, batched):
    torch.manual_seed(0)
    f = build().double()
    z, vectors = normal(5, 4), normal(3, 5, 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = dense_jacobian(f, z)
    local = Linearization(f, z)
    flat = vectors.flatten(1)
    torch.testing.assert_close(local.forward(vectors).flatten(1), flat @ jacobian.T)
    torch.testing.assert_close(local.adjoint(vectors).flatten(1), flat @ jacobian)
    assert not local.forward(vectors).requires_grad
    assert local.adjoint(vectors, create_graph=True).requires_grad
    assert local.batched == batched


def test_an_operation_without_vmap_and_forward_mode_is_taken_by_the_loop():
    weight = contraction(4, 0)
    local = Linearization(lambda z: AwkwardTanh.apply(z @ weight.T), normal(4))
    vectors = torch.eye(4, dtype=torch.float64)
    jacobian = dense_jacobian(lambda z: torch.tanh(z @ weight.T), normal(4))
    torch.testing.assert_close(local.forward(vectors), jacobian.T)  # the stack is along the columns here
    torch.testing.assert_close(local.adjoint(vectors), jacobian)
    assert not local.batched


def test_the_products_of_a_constant_map_are_zero():
    for value in (torch.ones(3), torch.ones(3, requires_grad=True)):
        local = Linearization(lambda z, value=value: 1 * value, torch.zeros(3))
        assert not local.forward(torch.ones(2, 3)).any()
        assert not local.adjoint(torch.ones(2, 3)).any()
