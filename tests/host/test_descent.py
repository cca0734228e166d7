"""Homeostasis by a descent of its own: the penalty's gradient never meets the optimiser, and its step has no unit."""

import copy
import math
import pickle

import pytest
import torch
import torchdeq
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.host.descent import LARGEST_CHANGE, Descent
from torchdeq_ep.state import relative_difference

B = 4


class Model(nn.Module):
    """A DEQ with weights that are far from symmetric, a stem and a read-out."""

    def __init__(self, n=6, gain=0.6):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer, self.readout = nn.Linear(3, n), nn.Linear(n, n), nn.Linear(n, 2)
        nn.init.orthogonal_(self.layer.weight, gain=gain)
        self.deq = torchdeq.get_deq(ift=True, f_tol=1e-12, f_max_iter=200)
        self.double()

    def forward(self, x):
        u = self.stem(x)
        z, _ = self.deq(lambda z: torch.tanh(self.layer(z) + u), torch.zeros_like(u))
        return self.readout(z[-1])


def inputs(rows=B):
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def still(model):
    """An optimiser that moves nothing, so that what moves is the descent."""
    return torch.optim.SGD(model.parameters(), lr=1e-30)


def run(model, optimizer, parts, scale=1.0):
    optimizer.zero_grad()
    for x in parts:
        (scale * model(x).square().sum()).backward()
    optimizer.step()


def dense_penalty(model, x):
    """Half the mean of `|(J - J^T) u|^2` and its gradients, by dense Jacobians, with the state and `u` held fixed."""
    with torch.no_grad():
        u, z = model.stem(x), torch.zeros(B, 6, dtype=torch.float64)
        for _ in range(400):
            z = torch.tanh(model.layer(z) + u)
    slopes = 1 - torch.tanh(model.layer(z) + model.stem(x)).square()
    jacobians = slopes.unsqueeze(2) * model.layer.weight
    point = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(model.readout(point).square().sum(), point)
    v = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - jacobians.detach(), g)
    directions = (v / v.norm(dim=1, keepdim=True)).unsqueeze(2)
    total = ((jacobians - jacobians.mT) @ directions).square().sum() / (2 * B)
    parameters = list(model.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return total.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_its_step_is_polyaks_and_the_gradient_of_the_loss_is_left_alone():
    model, other = Model(), Model()
    optimizer, before = still(model), vector(model.parameters())
    with (
        tep.use_backward(model, "ep", tol=1e-11),
        tep.register_homeostasis(model, 0.02, estimator="error-vector", descent=optimizer) as homeostasis,
    ):
        run(model, optimizer, [inputs()])
    assert not homeostasis.penalty().requires_grad
    value, gradients = dense_penalty(other, inputs())
    assert homeostasis.last.penalty == pytest.approx(2 * value, rel=1e-6)
    g = vector(gradients)
    assert relative_difference(before - vector(model.parameters()), 0.02 * 2 * value / g.dot(g) * g) < 1e-6
    with tep.use_backward(other, "ep", tol=1e-11):
        run(other, still(other), [inputs()])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [6, 48])
def test_neither_the_width_nor_the_scale_of_the_loss_has_to_be_known(n):
    model = Model(n)
    optimizer = still(model)
    with (
        tep.use_backward(model, "ep"),
        tep.register_homeostasis(model, 0.3, estimator="error-vector", descent=optimizer) as homeostasis,
    ):
        values = []
        for step in range(60):
            run(model, optimizer, [inputs()], scale=10.0 ** (step % 5 - 2))
            values.append(homeostasis.last.penalty)
    assert values[-1] < values[0] / 20


def test_passes_of_one_step_are_averaged():
    found = []
    for parts in ([inputs()], inputs().chunk(2)):
        model = Model()
        optimizer = still(model)
        with (
            tep.use_backward(model, "ep", tol=1e-11),
            tep.register_homeostasis(model, 0.02, estimator="error-vector", descent=optimizer),
        ):
            run(model, optimizer, parts)
        found.append(vector(model.parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_it_holds_the_target_under_adam_and_lets_go_above_it():
    model = Model(24, gain=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with (
        tep.use_backward(model, "ep"),
        tep.register_homeostasis(model, descent=optimizer, target=0.9) as homeostasis,
    ):
        alignments, shares = [], []
        for _ in range(150):
            run(model, optimizer, [inputs()])
            alignments.append(homeostasis.last.alignment["deq"])
            shares.append(homeostasis.last.weights["deq"])
    assert alignments[0] < 0.8
    assert alignments[-1] > 0.88
    assert 0 < min(shares) < max(shares) <= 1


def test_parameters_that_the_optimiser_was_not_given_stay():
    model = Model()
    optimizer, bias = torch.optim.SGD([model.layer.weight], lr=1e-30), model.layer.bias.detach().clone()
    weight = model.layer.weight.detach().clone()
    with (
        tep.use_backward(model, "ep"),
        tep.register_homeostasis(model, 0.5, estimator="error-vector", descent=optimizer),
    ):
        run(model, optimizer, [inputs()])
    assert torch.equal(model.layer.bias, bias)
    assert not torch.equal(model.layer.weight, weight)


def alone(value=1.0):
    parameter = nn.Parameter(torch.full((5,), value, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1e-30)
    descent = Descent(optimizer)
    descent.share = 1.0
    descent.register()
    return parameter, optimizer, descent


def test_no_step_is_longer_than_a_tenth_of_the_parameters():
    parameter, optimizer, descent = alone()
    descent.add([parameter], [torch.full((5,), 1e-6)], 1.0)  # an asymmetry that training hardly changes
    optimizer.step()
    assert (parameter.detach() - 1).norm() / math.sqrt(5) == pytest.approx(LARGEST_CHANGE, rel=1e-4)


def test_a_whole_step_comes_nearest_to_every_minimum():
    """Eq. (25): of all lengths along the gradient of `|A w|^2 / 2`, for each `w` with `A w = 0`."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    parameter, optimizer, descent = alone(40.0)
    descent.share = 0.05  # a step that is not cut
    before = parameter.detach().clone()
    gradient = 0.001 * a.T @ a @ before
    descent.add([parameter], [gradient], 0.0005 * float((a @ before).square().sum()))
    optimizer.step()
    moved = (before - parameter.detach()) / descent.share
    null = torch.linalg.svd(a).Vh[3:]
    for _ in range(4):
        minimum = null.T @ torch.randn(2, generator=generator, dtype=torch.float64)
        distance = [float((before - length * moved - minimum).norm()) for length in (0.0, 0.9, 1.0, 1.1)]
        assert min(distance) == distance[2]


def test_what_cannot_be_trained_away_does_not_drive_the_parameters_off():
    """`P = (x^2 + 1) / 2`: the floor of 1/2 would make the step grow without bound where the rest is gone."""
    parameter, optimizer, descent = alone(3.0)
    seen = []
    for _ in range(60):
        x = parameter.detach().clone()
        descent.add([parameter], [x / 5], float(x.square().mean() + 1) / 2)
        optimizer.step()
        seen.append(float(parameter.detach().abs().max()))
    assert max(seen) < 3.0
    assert max(seen[-20:]) < 0.3


@pytest.mark.parametrize("gradient", [math.nan, math.inf, 0.0])
def test_what_is_no_gradient_moves_nothing_and_is_forgotten(gradient):
    parameter, optimizer, descent = alone()
    descent.add([parameter], [torch.full((5,), gradient, dtype=torch.float64)], 1.0)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(5, dtype=torch.float64))
    descent.add([parameter], [torch.ones(5, dtype=torch.float64)], 0.025)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((5,), 0.99, dtype=torch.float64))


@pytest.mark.parametrize("first", [torch.complex64, torch.bfloat16, torch.float32])
def test_parameters_of_several_dtypes_are_moved_by_one_length(first):
    parameters = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (first, torch.float64, torch.complex128)]
    optimizer = torch.optim.SGD(parameters, lr=1e-30)
    descent = Descent(optimizer)
    descent.share = 1.0
    descent.register()
    gradients = [torch.ones_like(p) * (1 + 1j if p.is_complex() else 1) for p in parameters]
    descent.add(parameters, gradients, value=0.01)
    optimizer.step()
    length = 2 * 0.01 / sum(float(g.abs().square().sum()) for g in gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), 1 - length * gradient)


def test_it_follows_the_schedule_of_the_optimiser():
    parameter, optimizer, descent = alone()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5, 1.0, 0.25][step])
    moves = []
    for _ in range(4):
        before = parameter.detach().clone()
        descent.add([parameter], [torch.ones(5, dtype=torch.float64)], 0.025)
        optimizer.step()
        moves.append(float((before - parameter.detach()).max()))
        schedule.last_epoch < 3 and schedule.step()
    assert moves == pytest.approx([0.0, 0.005, 0.01, 0.0025])


@pytest.mark.parametrize("estimator", ["antisymmetric", "error-vector"])
def test_a_resumed_descent_goes_on_where_it_stood(estimator):
    found = []
    for is_resumed in (False, True):
        model = Model()
        tep.use_backward(model, "ep")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        homeostasis = tep.register_homeostasis(model, estimator=estimator, descent=optimizer, seed=lambda: 3)
        for step in range(8):
            if is_resumed and step == 4:
                state = pickle.loads(pickle.dumps(homeostasis.state_dict()))
                homeostasis.remove()
                homeostasis = tep.register_homeostasis(model, estimator=estimator, descent=optimizer, seed=lambda: 3)
                homeostasis.load_state_dict(state)
            if estimator == "antisymmetric":
                homeostasis._regulators[0]._options.randomness._now = None  # each step with the same probes
            run(model, optimizer, [inputs()])
        found.append(vector(model.parameters()))
    assert torch.equal(*found)


def test_in_random_directions_no_weight_has_to_be_given():
    model = Model(24, gain=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    metric = tep.ActivityMetric("tanh")  # so that weights are all that is asymmetric
    with tep.register_homeostasis(model, estimator="antisymmetric", metric=metric, descent=optimizer) as homeostasis:
        symmetries = []
        for _ in range(60):
            run(model, optimizer, [inputs(32)])
            symmetries.append(homeostasis.last.symmetry)
    assert symmetries[0] < 0.6
    assert min(symmetries[-20:]) > 0.9


def test_a_step_without_a_backward_pass_moves_nothing_and_none_comes_after_the_end():
    model = Model()
    optimizer, before = still(model), vector(model.parameters())
    homeostasis = tep.register_homeostasis(model, 0.5, estimator="error-vector", descent=optimizer)
    with tep.use_backward(model, "ep"):
        optimizer.step()
        assert torch.equal(vector(model.parameters()), before)
        homeostasis.remove()
        run(model, optimizer, [inputs()])
    assert torch.equal(vector(model.parameters()), before)


def test_lbfgs_moves_inside_its_closures_and_the_descent_after_them():
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    with (
        tep.use_backward(model, "ep"),
        tep.register_homeostasis(model, 0.3, estimator="error-vector", descent=optimizer) as homeostasis,
    ):

        def closure():
            optimizer.zero_grad()
            loss = (model(inputs()) - 1).square().mean()
            loss.backward()
            return loss

        values = []
        for _ in range(20):
            optimizer.step(closure)
            values.append(homeostasis.last.penalty)
    assert values[-1] < values[0] / 3


def test_copies_are_without_it():
    model = Model()
    optimizer = still(model)
    tep.use_backward(model, "ep")
    tep.register_homeostasis(model, 0.5, estimator="error-vector", descent=optimizer)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied, before = still(again), vector(again.parameters())
        run(again, copied, [inputs()])
        assert torch.equal(vector(again.parameters()), before)
    pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("estimator", ["antisymmetric", "error-vector"])
@pytest.mark.parametrize("is_beside", [True, False])
def test_a_comparison_in_between_leaves_nothing_behind(estimator, is_beside):
    """Not a penalty, not a part of the next step, not another draw of probes, and `last` is that of training."""
    found = []
    for is_compared in (True, False):
        model = Model()
        tep.use_backward(model, "ep")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        homeostasis = tep.register_homeostasis(
            model, 0.3, estimator=estimator, descent=optimizer if is_beside else None
        )
        for _ in range(3):
            optimizer.zero_grad()
            (model(inputs()).square().sum() + homeostasis.penalty()).backward()
            last = homeostasis.last
            if is_compared:
                tep.compare(model, inputs(), lambda y: y.square().sum(), ["ift"], repeats=1)
                assert repr(homeostasis.last) == repr(last)
            optimizer.step()
        found.append(vector(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": 20.0, "estimator": "antisymmetric"}, "share"),
        ({"weight": 1.5, "estimator": "error-vector"}, "share"),
        ({"weight": {"deq": 1.5}, "estimator": "error-vector"}, "share"),
        ({"inject": True}, "inject="),
        ({"descent": "adam"}, "optimiser"),
    ],
)
def test_options_are_checked(options, match):
    model = Model()
    tep.use_backward(model, "ep")
    with pytest.raises(InvalidOptionError, match=match):
        tep.register_homeostasis(model, **{"descent": still(model), **options})


@pytest.mark.parametrize("estimator", ["antisymmetric", "error-vector"])
@pytest.mark.parametrize(("weight", "match"), [(20.0, "share"), (-1.0, "at least 0"), (math.nan, "at least 0")])
def test_what_a_function_gives_is_checked_in_the_pass(estimator, weight, match):
    model = Model()
    tep.use_backward(model, "ep")
    tep.register_homeostasis(model, lambda step: weight, estimator=estimator, descent=still(model))
    with pytest.raises(InvalidOptionError, match=match):
        model(inputs())


def test_a_share_of_nothing_measures_and_takes_no_gradient():
    model = Model()
    optimizer, before = still(model), vector(model.parameters())
    tep.use_backward(model, "ep")
    homeostasis = tep.register_homeostasis(model, 0.0, estimator="error-vector", descent=optimizer)
    run(model, optimizer, [inputs()])
    assert homeostasis.last.penalty > 0
    assert homeostasis.state_dict()["deq"]["length"] == math.inf
    assert torch.equal(vector(model.parameters()), before)


def test_a_state_of_a_run_without_a_descent_is_one_to_begin_from():
    model = Model()
    tep.use_backward(model, "ep")
    with tep.register_homeostasis(model) as homeostasis:
        (model(inputs()).square().sum() + homeostasis.penalty()).backward()
        state = homeostasis.state_dict()
    beside = tep.register_homeostasis(model, descent=still(model))
    beside.load_state_dict(state)
    assert beside.state_dict()["deq"]["passes"] == 1
    assert state["deq"]["weight"] > beside.state_dict()["deq"]["weight"] == 1.0  # no share is larger
    assert beside.state_dict()["deq"]["length"] == math.inf
