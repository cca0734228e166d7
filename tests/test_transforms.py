"""Every transform of `torch.func`, by every way into the package, in every mode: right, or refused by name.

The map is descent on an energy, so its Jacobian is symmetric and the gradient of every mode is the exact one.
"""

import sys
from functools import cache

import pytest
import torch
import torchdeq
from problems import contraction, normal, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import torchdeq_ep as tep
from torchdeq_ep.errors import DoubleBackwardError, MissingHistoryError, TransformError
from torchdeq_ep.state import undisturbed

N, BATCH, STEPS = 3, 2, 50
TRUNCATED = ("jfb", "neumann", "one-step", "phantom", "reversible", "shine", "unrolled")
MODES = tuple(name for name in tep.available_backwards() if name not in TRUNCATED)
EXACT = ("ift", "aep", "gmres")
TOLERANCE = {"ep-one-sided": 1e-5, "hep-online": 1e-3}  # the latter takes a given number of steps
ROOT = contraction(N, 0, 0.6)
X = normal(BATCH, N, seed=1)
ALONG = normal(BATCH, N, seed=2)


def _f(z, root, x):
    weight = 0.5 * (root + root.T)
    return 0.5 * z + 0.5 * (torch.tanh(z @ weight) @ weight + x)


def _unrolled(root, x, mode=None):
    z = torch.zeros_like(x)
    for _ in range(STEPS):
        z = _f(z, root, x)
    return z


def _attached(root, x, mode):
    with torch.no_grad():
        z = _unrolled(root, x)
    return tep.attach(lambda z: _f(z, root, x), z, mode)


class _Model(nn.Module):
    def __init__(self, core="sliced", **options):
        super().__init__()
        self.root = nn.Parameter(ROOT.clone())
        config = {"ift": True, "f_max_iter": STEPS, "f_tol": 1e-14, **options}
        self.deq = torchdeq.get_deq(core=core, **config)

    def forward(self, x):
        states, _ = self.deq(lambda z: _f(z, self.root, x), torch.zeros_like(x))
        return states[-1]


def _switched(root, x, mode):
    model = _Model()
    tep.use_backward(model, mode)
    return functional_call(model, {"root": root}, (x,))


def _looped(root, x, mode):
    return tep.loop(lambda z: _f(z, root, x), torch.zeros_like(x), STEPS, mode)


ENTRIES = {"attach": _attached, "switched": _switched, "loop": _looped}


def _directional(function, x, along):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent


def _batched(function, x):
    x = x.clone().requires_grad_()
    z = function(x)
    basis = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    return torch.autograd.grad(z, x, basis, is_grads_batched=True)[0].reshape(*z.shape, *x.shape)


def _outer(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(vmap(function)(x).pow(3).sum(), x)[0]


def _cubed(function):
    return lambda x: function(x).pow(3).sum()


def _jacobian(**options):
    return lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, **options)


FIRST = {
    "grad": lambda f, x: grad(_cubed(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](ALONG)[0],
    "jvp": lambda f, x: jvp(f, (x,), (ALONG,))[1],
    "jvp without autograd": lambda f, x: torch.no_grad()(jvp)(f, (x,), (ALONG,))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "vmap": lambda f, x: vmap(f)(x),
    "vmap within autograd": _outer,
    "vmap(grad)": lambda f, x: vmap(grad(_cubed(f)))(x),
    "vmap(vmap(jvp))": lambda f, x: vmap(vmap(lambda a, b: jvp(f, (a,), (b,))[1], (0, 0)), (None, 0))(
        x, torch.stack([ALONG, 2 * ALONG])
    ),
    "forward_ad": lambda f, x: _directional(f, x, ALONG),
    "forward_ad without autograd": lambda f, x: torch.no_grad()(_directional)(f, x, ALONG),
    "is_grads_batched": _batched,
    "functional.jacobian": _jacobian(),
    "functional.jacobian, forward": _jacobian(strategy="forward-mode"),
}
FORWARD_TWICE = {"jacfwd(jacfwd)": lambda f, x: jacfwd(jacfwd(_cubed(f)))(x)}
SECOND = {
    "hessian": lambda f, x: hessian(_cubed(f))(x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(_cubed(f)))(x),
    "jacrev(jacfwd)": lambda f, x: jacrev(jacfwd(_cubed(f)))(x),
    "vmap(hvp)": lambda f, x: vmap(lambda a, b: jvp(grad(_cubed(f)), (a,), (b,))[1])(x, ALONG),
}
REFUSED = {
    "create_graph": (DoubleBackwardError, lambda f, x: torch.autograd.functional.hessian(_cubed(f), x)),
    "forward_ad of a backward pass": (
        DoubleBackwardError,
        lambda f, x: torch.autograd.functional.hessian(
            _cubed(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ),
    "linearize": (TransformError, lambda f, x: linearize(f, x)[1](ALONG)),
}


ALL = {**FIRST, **FORWARD_TWICE, **SECOND}


@cache
def _expected(transform):
    return ALL[transform](lambda x: _unrolled(ROOT, x), X)


QUICK = ("ift", "aep", "ep", "hep")
CELLS = [
    pytest.param(entry, mode, marks=[] if entry == "attach" or mode in QUICK else pytest.mark.slow)
    for entry in ENTRIES
    for mode in MODES
]


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize(("entry", "mode"), CELLS)
def test_every_cell_is_right_or_refused(entry, transform, mode):

    def layer(x):
        return ENTRIES[entry](ROOT, x, mode)

    if transform in SECOND and mode not in EXACT:
        with pytest.raises(DoubleBackwardError, match="Use 'ift' or 'aep'"):
            ALL[transform](layer, X)
        return
    assert relative_error(ALL[transform](layer, X), _expected(transform)) < TOLERANCE.get(mode, 1e-7)


@pytest.mark.parametrize("transform", [name for name in ALL if name not in ("is_grads_batched", "functional.jacobian")])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mode", ["neumann", "phantom:k=3"])
def test_approximations_are_seen_by_no_transform(entry, transform, mode):
    with pytest.raises(TransformError, match="approximation"):
        ALL[transform](lambda x: ENTRIES[entry](ROOT, x, mode), X)


@pytest.mark.parametrize("transform", ["is_grads_batched", "functional.jacobian"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mode", ["one-step", "neumann:k=3", "phantom:k=3,tau=0.5", "unrolled:k=3"])
def test_batched_cotangents_of_an_approximation(entry, transform, mode):
    def layer(x):
        return ENTRIES[entry](ROOT, x, mode)

    assert relative_error(ALL[transform](layer, X), torch.autograd.functional.jacobian(layer, X)) < 1e-12


@pytest.mark.parametrize(("solver", "mode"), [("broyden-inverse", "shine"), ("reversible", "reversible")])
def test_batched_cotangents_of_what_a_solver_keeps(solver, mode):
    core = torchdeq.get_deq(f_solver=solver, f_tol=1e-10, f_max_iter=30)
    tep.use_backward(core, mode)

    def layer(x):
        return core(lambda z: _f(z, ROOT, x), torch.zeros_like(x))[0][-1]

    one_by_one = torch.autograd.functional.jacobian(layer, X)
    if mode == "shine":
        with pytest.raises(TransformError, match="kept of one forward pass"):
            ALL["functional.jacobian"](layer, X)
    else:
        # A product of several vectors is not rounded as those of each are, on every machine.
        assert relative_error(ALL["functional.jacobian"](layer, X), one_by_one) < 1e-12


@pytest.mark.parametrize("entry", ["attach", "switched"])
def test_steps_from_the_equilibrium_are_seen_by_no_transform(entry):
    with pytest.raises(TransformError, match="approximation"):
        jvp(lambda x: ENTRIES[entry](ROOT, x, "unrolled:k=3"), (X,), (ALONG,))


@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize(
    "options", [{}, {"supervise": [20, STEPS]}, {"halt": lambda z, step: torch.arange(len(z)) < step - 30}]
)
@pytest.mark.parametrize("mode", ["unrolled", "unrolled:k=3"])
def test_steps_of_a_loop_are_what_every_transform_differentiates(mode, options, transform):
    """Truncated steps have a tangent: nothing before them does."""

    def by_hand(x):
        kept = 3 if mode.endswith("3") else STEPS - options.get("supervise", [0])[0]
        z = _unrolled(ROOT, x).detach() if kept == 3 else torch.zeros_like(x)
        for _ in range(kept):
            z = _f(z, ROOT, x)
        return z

    def looped(x):
        found = tep.loop(lambda z: _f(z, ROOT, x), torch.zeros_like(x), STEPS, mode, **options)
        return found[-1] if "supervise" in options else found

    assert relative_error(ALL[transform](looped, X), ALL[transform](by_hand, X)) < 1e-6


def test_a_loop_whose_samples_halted_before_is_refused():
    halt = {"halt": lambda z, step: torch.arange(len(z)) == 0, "supervise": [3, 6]}
    with pytest.raises(TransformError, match="have halted have no gradient"):
        grad(lambda x: tep.loop(lambda z: _f(z, ROOT, x), torch.zeros_like(x), 6, "ift", **halt)[-1].sum())(X)


def test_a_solver_of_a_loop_cannot_be_batched():
    def solved(x):
        return tep.loop(lambda z: _f(z, ROOT, x), torch.zeros_like(x), STEPS, "ift", solver="anderson", tol=1e-12)

    assert relative_error(jacfwd(solved)(X), _expected("jacfwd")) < 1e-7
    with pytest.raises(TransformError, match="cannot be evaluated"):
        vmap(solved)(torch.stack([X, X]))


@pytest.mark.parametrize("mode", TRUNCATED)
def test_every_approximation_is_refused(mode):
    with pytest.raises((TransformError, MissingHistoryError)):
        jvp(lambda x: _attached(ROOT, x, mode), (X,), (ALONG,))


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mode", ["ift", "ep"])
def test_what_cannot_be_served_has_a_name(monkeypatch, entry, transform, mode):
    if transform == "linearize":  # which traces every step, and that takes long
        monkeypatch.setattr(sys.modules[__name__], "STEPS", 3)
    kind, function = REFUSED[transform]
    with pytest.raises(kind):
        function(lambda x: ENTRIES[entry](ROOT, x, mode), X)


# --- maps of other kinds ---------------------------------------------------------------------------------------------


def _tanh(z, w, x):
    return torch.tanh(z @ w.T + x)


def _relu(z, w, x):
    return torch.relu(z @ w.T + x)


def _convolution(z, w, x):
    images = z.reshape(BATCH, 1, 2, 2)
    return torch.tanh(nn.functional.conv2d(images, w[None, None, :3, :3], padding=1)).reshape(BATCH, 4) + x


def _complex(z, w, x):
    return torch.tanh(z @ w.T.to(z.dtype)) * 0.7 + 0.1j * z.conj() + x


MAPS = {"tanh": _tanh, "relu": _relu, "convolution": _convolution, "complex": _complex}


def _solved(f, x):
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(STEPS):
            z = f(z)
    return z


@pytest.mark.parametrize("mode", ["ift", "aep", "ep-infinitesimal", "ep", "ep-one-sided", "hep"])
@pytest.mark.parametrize("name", MAPS)
def test_forward_derivatives_are_those_of_the_dense_jacobian(name, mode):
    """`dz*/dx = (I - J)^-1 df/dx`, and nothing here is symmetric."""
    if (name, mode) in [("relu", "hep"), ("complex", "hep")]:
        pytest.skip("a kink and a conjugate have no complex states")
    f, w = MAPS[name], 0.6 * contraction(4, 3, 0.9)
    x = normal(BATCH, 4, seed=1)
    dtype = torch.complex128 if name == "complex" else torch.float64

    def layer(x):
        start = x.to(dtype) * (1 + 0.5j) if name == "complex" else x
        z = tep.attach(lambda z: f(z, w, start), _solved(lambda z: f(z, w, start), start), mode)
        return torch.view_as_real(z) if name == "complex" else z

    def reals(z):
        return torch.view_as_real(z).flatten() if z.is_complex() else z.flatten()

    def map_of_reals(z, x):
        state = torch.view_as_complex(z.reshape(BATCH, 4, 2)) if name == "complex" else z.reshape(BATCH, 4)
        return reals(f(state, w, x * (1 + 0.5j) if name == "complex" else x))

    z = layer(x).flatten()
    jacobian, through = jacrev(map_of_reals, argnums=(0, 1))(z, x)
    expected = torch.linalg.solve(torch.eye(len(z), dtype=z.dtype) - jacobian, through.flatten(1))
    tolerance = {"ep-one-sided": 1e-6}.get(mode, 1e-8)
    assert relative_error(jacfwd(layer)(x).reshape(expected.shape), expected) < tolerance
    if mode in EXACT:
        assert relative_error(jacrev(layer)(x).reshape(expected.shape), expected) < 1e-8


@pytest.mark.parametrize("mode", ["ift", "ep"])
def test_a_state_of_two_tensors(mode):
    w = 0.5 * contraction(5, 4, 0.9)

    def layer(x):
        def f(a, b):
            out = torch.tanh(torch.cat([a.flatten(), b]) @ w.T + x)
            return out[:2].reshape(1, 2), out[2:]

        with torch.no_grad():
            state = (torch.zeros(1, 2, dtype=x.dtype), torch.zeros(3, dtype=x.dtype))
            for _ in range(STEPS):
                state = f(*state)
        a, b = tep.attach(f, state, mode)
        return torch.cat([a.flatten(), b])

    x = normal(5, seed=6)
    z = layer(x)
    slope = (1 - z**2)[:, None]
    expected = torch.linalg.solve(torch.eye(5, dtype=z.dtype) - slope * w, slope * torch.eye(5, dtype=z.dtype))
    assert relative_error(jacfwd(layer)(x), expected) < 1e-8


def test_tangents_of_ep_are_exact_where_its_gradient_is_not():
    w, x = 0.7 * contraction(8, 0, 1.0), normal(3, 8, seed=1)

    def layer(w, mode):
        return tep.attach(lambda z: _tanh(z, w, x), _solved(lambda z: _tanh(z, w, x), x), mode)

    def loss(w, mode):
        return layer(w, mode).pow(2).sum()

    exact = grad(loss)(w, "ift")
    forward = torch.einsum("ijkl,ij->kl", jacfwd(layer)(w, "ep"), 2 * layer(w, "ep"))
    assert relative_error(grad(loss)(w, "ep"), exact) > 0.2
    assert relative_error(forward, exact) < 1e-8


@pytest.mark.parametrize("mode", EXACT)
def test_gradcheck_of_forward_and_batched_derivatives(mode):
    arguments = (ROOT.clone().requires_grad_(), X.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda root, x: _attached(root, x, mode), arguments, check_forward_ad=True, check_batched_grad=True
    )


# --- what a map may be -----------------------------------------------------------------------------------------------


def _linear_model(core="sliced", mode="ift", **options):
    model = _Model(core, **options)
    tep.use_backward(model, mode)
    return model


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "anderson", "broyden", "relaxation"])
def test_parameters_that_functional_call_has_put_back(core, f_solver):
    """Its backward pass runs when the module has its own parameters again: those of the call count."""
    model = _linear_model(core, f_solver=f_solver)
    others = torch.stack([0.9 * ROOT, 1.1 * ROOT])

    def loss(root):
        return functional_call(model, {"root": root}, (X,)).pow(2).sum()

    def unrolled(root):
        return _unrolled(root, X).pow(2).sum()

    assert relative_error(vmap(grad(loss))(others), vmap(grad(unrolled))(others)) < 1e-5
    along = jvp(grad(loss), (others[0],), (ROOT,))[1]
    assert relative_error(along, jvp(grad(unrolled), (others[0],), (ROOT,))[1]) < 1e-4
    of_x = grad(lambda x: functional_call(model, {"root": others[0]}, (x,)).sum())(X)
    assert relative_error(of_x, grad(lambda x: _unrolled(others[0], x).sum())(X)) < 1e-5
    assert torch.equal(model.root, ROOT)


def test_a_map_that_holds_its_module_out_of_sight_is_refused():
    class Hidden:
        __slots__ = ("module",)

    hidden, model = Hidden(), nn.Linear(N, N).double()
    hidden.module = model
    with torch.no_grad():
        model.weight.mul_(0.3)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            def f(z):
                return torch.tanh(hidden.module(z) + x)

            return tep.attach(f, _solved(f, x), "ift")

    wrapper = Wrapper()
    other = {name: 1.1 * p.detach() for name, p in wrapper.named_parameters()}
    with pytest.raises(TransformError, match="functional_call has put parameters back"):
        grad(lambda p: functional_call(wrapper, p, (X,)).sum())(other)


def test_a_map_that_takes_no_stack_is_solved_one_by_one():
    def layer(x):
        def f(z):
            assert torch.isfinite(z).all()  # looks at data, which vmap cannot
            return _f(z, ROOT, x)

        return tep.attach(f, _solved(f, x), "ift")

    assert relative_error(jacrev(layer)(X), _expected("jacrev")) < 1e-8
    assert relative_error(jacfwd(layer)(X), _expected("jacfwd")) < 1e-8


def test_cotangents_of_any_size_in_one_stack():
    def pulled(sizes):
        return vmap(lambda s: vjp(lambda x: _attached(ROOT, x, "ift"), X)[1](s * ALONG)[0])(sizes)

    sizes = torch.tensor([1.0, 0.0, 1e-9, 1e12], dtype=torch.float64)
    found, one = pulled(sizes), pulled(sizes[:1])[0]
    for size, each in zip(sizes, found, strict=True):
        assert torch.allclose(each, size * one, rtol=1e-8, atol=0)


def test_batch_norm_keeps_its_statistics():
    norm = nn.BatchNorm1d(N).double().train().requires_grad_(False)

    def layer(x):
        def f(z):
            return torch.tanh(0.3 * norm(z) + x)

        with undisturbed():
            z = _solved(f, x)
        return tep.attach(f, z, "ift")

    before = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    x = normal(8, N, seed=3)
    found = jacrev(layer)(x)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.num_batches_tracked, before[1])
    assert relative_error(jacfwd(layer)(x), found) < 1e-8


def test_in_evaluation_mode_a_derivative_is_refused_and_a_batch_is_not():
    model = _linear_model().eval()
    assert relative_error(vmap(model)(X), _unrolled(ROOT, X)) < 1e-8
    for transform in (lambda: jvp(model, (X,), (ALONG,)), lambda: grad(_cubed(model))(X)):
        with pytest.raises(TransformError, match="evaluation mode"):
            transform()
    with pytest.raises(TransformError, match="evaluation mode"):
        _directional(model, X, ALONG)
    with torch.no_grad():
        frozen = model(X)
    assert torch.equal(grad(lambda x: (model(X) * x).sum())(X), frozen)  # it does not depend on x


@pytest.mark.parametrize("estimator", ["antisymmetric", "error-vector"])
def test_homeostasis_is_refused(estimator):
    model = _linear_model()
    tep.register_homeostasis(model, 0.1, estimator=estimator, inject=True)
    with pytest.raises(TransformError, match="homeostasis"):
        grad(_cubed(model))(X)


def test_loss_nudging_is_refused():
    model = _linear_model(mode="ep")
    with tep.nudge_loss(model, lambda z: z.sum()), pytest.raises(TransformError, match="nudge_loss"):
        grad(lambda x: model(x).sum())(X)


def test_a_second_derivative_of_a_linear_loss_is_refused():
    """The cotangent does not depend on the parameters there, and the error vector does."""
    root = ROOT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_attached(root, X, "ift").sum(), root, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        gradient.pow(2).sum().backward()


def test_each_solve_is_reported():
    reports = []

    def layer(x):
        z = _solved(lambda z: _f(z, ROOT, x), x)
        return tep.attach(lambda z: _f(z, ROOT, x), z, "ep:beta=0.01", writer=reports.append)

    jacfwd(layer)(X)
    assert [report.beta for report in reports] == [0.01]


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_compiled_training_step(backward_inside):
    model = _linear_model(mode="ep")
    model(X).pow(2).sum().backward()
    expected, model.root.grad = model.root.grad, None

    def loss():
        value = model(X).pow(2).sum()
        if backward_inside:
            value.backward()
        return value

    value = torch.compile(loss, backend="eager")()
    if not backward_inside:
        value.backward()
    assert torch.equal(model.root.grad, expected)


@pytest.mark.filterwarnings("ignore")
def test_one_graph_of_an_equilibrium_is_refused_by_name():
    torch._dynamo.reset()  # what was compiled with breaks is used again
    with pytest.raises(RuntimeError, match="an equilibrium cannot be part of one graph"):
        torch.compile(_linear_model(), backend="eager", fullgraph=True)(X)
