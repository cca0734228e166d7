"""deepinv's own deep-equilibrium reconstruction, against a dense reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.jacobian import dense_jacobian

dinv = pytest.importorskip("deepinv")
SIZE = 6


class Potential(nn.Module):
    """A denoiser that is a gradient step, `x - grad h(x)`, of a convex potential; its Jacobian is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.3 * torch.randn(3, 1, 3, 3, dtype=torch.float64))

    def forward(self, x, sigma=None):
        features = torch.tanh(nn.functional.conv2d(x, self.kernel, padding=1))
        return x - 0.2 * nn.functional.conv_transpose2d(features, self.kernel, padding=1)


class Plain(nn.Module):
    """A denoiser without a potential, as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(a, b, 3, padding=1, dtype=torch.float64) for a, b in ((1, 4), (4, 1)))

    def forward(self, x, sigma=None):
        return 0.9 * x + 0.3 * self.second(torch.tanh(self.first(x)))


def reconstruction(denoiser, kind="HQS", **options):
    """A deep-equilibrium reconstruction from a blurred image."""
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9
    physics = dinv.physics.BlurFFT(img_size=(1, SIZE, SIZE), filter=kernel, device="cpu")
    # With g_first, proximal gradient descent takes the gradient of the prior and the proximal map of the data.
    is_gradient = kind == "PGD" and options.get("g_first")
    prior = options.pop("prior", None) or (dinv.optim.RED if is_gradient else dinv.optim.PnP)(denoiser=denoiser)
    make = getattr(dinv.optim, kind)
    model = make(
        data_fidelity=dinv.optim.L2(),
        prior=prior,
        stepsize=0.8,
        sigma_denoiser=0.03,
        max_iter=250,
        early_stop=True,
        crit_conv="residual",
        thres_conv=1e-13,
        DEQ=True,
        **options,
    )
    return model, physics


class Problem:
    def __init__(self, denoiser=Potential, kind="HQS", **options):
        torch.manual_seed(0)
        self.denoiser = denoiser()
        self.model, self.physics = reconstruction(self.denoiser, kind, **options)
        self.y = self.physics(torch.rand(2, 1, SIZE, SIZE, dtype=torch.float64)).detach()
        self.g = torch.randn(2, 1, SIZE, SIZE, dtype=torch.float64)

    def gradient(self):
        x = self.model(self.y, self.physics)
        return x.detach(), torch.autograd.grad(x, list(self.denoiser.parameters()), self.g)

    def reference(self):
        """By a dense linear system in float64."""
        model, last = self.model, self.model.max_iter - 1
        fidelity, prior, parameters = (
            model.update_data_fidelity_fn(last),
            model.update_prior_fn(last),
            model.update_params_fn(last),
        )

        def step(z):
            return model.fixed_point.iterator({"est": (z,)}, fidelity, prior, parameters, self.y, self.physics)["est"][
                0
            ]

        with torch.no_grad():
            z = model(self.y, self.physics)
            for _ in range(400):
                z = step(z)
        matrix = torch.eye(z.numel(), dtype=z.dtype) - dense_jacobian(step, z).T
        v = torch.linalg.solve(matrix, self.g.flatten()).reshape(z.shape)
        return torch.autograd.grad(step(z), list(self.denoiser.parameters()), v)


def error(found, expected):
    joined = [torch.cat([t.flatten() for t in gradients]) for gradients in (found, expected)]
    return float((joined[0] - joined[1]).norm() / joined[1].norm())


@pytest.mark.parametrize("kind", ["HQS", "PGD"])
@pytest.mark.parametrize("denoiser", [Potential, Plain])
def test_exact_modes_equal_a_dense_reference(kind, denoiser):
    problem = Problem(denoiser, kind)
    expected = problem.reference()
    own_value, own = problem.gradient()
    assert error(own, expected) < 0.05
    # The plain denoiser contracts less, and its free phase stops before rounding.
    tolerance = 1e-9 if denoiser is Potential else 1e-4
    for spec in ("ift:tol=1e-12", "aep:tol=1e-10"):
        with tep.use_backward(problem.model, spec):
            value, found = problem.gradient()
        assert torch.equal(value, own_value)
        assert error(found, expected) < tolerance
    assert all(torch.equal(a, b) for a, b in zip(problem.gradient()[1], own, strict=True))


@pytest.mark.parametrize("kind", ["HQS", "PGD"])
@pytest.mark.parametrize("g_first", [False, True])
def test_with_the_operator_metric_ep_is_exact_for_a_potential_prior(kind, g_first):
    problem = Problem(Potential, kind, g_first=g_first)
    expected = problem.reference()
    with tep.use_backward(problem.model, "ep-infinitesimal", metric="proximal", tol=1e-13):
        assert error(problem.gradient()[1], expected) < 1e-9
    with tep.use_backward(problem.model, "ep", metric="proximal", tol=1e-10) as handle:
        assert error(problem.gradient()[1], expected) < 1e-5
        (problem.model(problem.y, problem.physics) * problem.g).sum().backward()
    assert handle.last["0"].adjoint_residual < 1e-5
    with tep.use_backward(problem.model, "ep", tol=1e-10):
        assert error(problem.gradient()[1], expected) > 1e-3


def test_every_mode_of_the_menu_can_be_chosen():
    problem = Problem()
    expected = problem.reference()
    errors = []
    for spec in ("one-step", "neumann:k=5", "phantom:k=40,tau=0.9", "unrolled:k=80", "ift:tol=1e-12"):
        with tep.use_backward(problem.model, spec):
            errors.append(error(problem.gradient()[1], expected))
    assert errors == sorted(errors, reverse=True)


def test_what_is_no_deep_equilibrium_model_is_refused():
    model, _ = reconstruction(Potential())
    model.DEQ = False
    with pytest.raises(tep.errors.NoDEQError):
        tep.use_backward(model, "ift")
    problem = Problem(Potential, "GD", prior=dinv.optim.Tikhonov())
    with tep.use_backward(problem.model, "ep", metric="proximal"), pytest.raises(InvalidOptionError, match="proximal"):
        problem.gradient()
    with pytest.raises(InvalidOptionError, match="takes no metric"):
        tep.use_backward(problem.model, "ift", metric="proximal")
