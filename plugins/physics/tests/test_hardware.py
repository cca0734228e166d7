"""What real devices do: each wrapper against its definition; and the recipes that train with them."""

import json
import math

import pytest
import torch
from torch.nn.utils import parametrize

import torchdeq_ep_physics as physics
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics import recipes
from torchdeq_ep_physics.recipes import learning_rules


def uniform(count=2000, low=-16.0, high=-4.0):
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_levels_are_as_many_as_the_bits_say_evenly_spaced_and_within_the_bounds():
    for bits in (1, 2, 5):
        levels = physics.Quantised(bits, 1e-6, 1e-3)(uniform()).exp().unique()
        steps = levels.diff()
        wide = levels[torch.cat([torch.tensor([True]), steps > 1e-12])]
        assert len(wide) == 2**bits
        assert wide[0].item() == pytest.approx(1e-6)
        assert wide[-1].item() == pytest.approx(1e-3)
        torch.testing.assert_close(wide, torch.linspace(1e-6, 1e-3, 2**bits, dtype=torch.float64))


def test_each_conductance_gets_the_nearest_level():
    u = uniform(low=math.log(1e-6), high=math.log(1e-3))
    step = (1e-3 - 1e-6) / 15
    written = physics.Quantised(4, 1e-6, 1e-3)(u).exp()
    assert ((written - u.exp()).abs() <= step / 2 * (1 + 1e-9)).all()


def test_the_gradient_passes_a_level_but_no_bound():
    u = torch.tensor([-20.0, math.log(3e-4), 0.0], dtype=torch.float64, requires_grad=True)
    physics.Quantised(3, 1e-6, 1e-3)(u).sum().backward()
    assert u.grad.tolist() == [0.0, 1.0, 0.0]


def test_mismatch_is_log_normal_fixed_and_of_the_seed():
    u = torch.zeros(20000, dtype=torch.float64)
    device = physics.Mismatch(len(u), 0.2, seed=3)
    logs = device(u)
    assert logs.std().item() == pytest.approx(0.2, rel=0.03)
    assert abs(logs.mean().item()) < 5 * 0.2 / math.sqrt(len(u))
    assert torch.equal(device(u), logs)
    assert torch.equal(physics.Mismatch(len(u), 0.2, seed=3)(u), logs)
    assert not torch.equal(physics.Mismatch(len(u), 0.2, seed=4)(u), logs)
    assert torch.equal(physics.Mismatch(len(u), 0.0)(u), u)


def test_drift_is_a_power_law_of_the_time_since_writing():
    u = uniform(20000)
    drift = physics.Drift(len(u), 0.05, spread=0.01)
    for elapsed in (0.0, 0.5, 1.0):
        drift.elapsed = elapsed
        assert torch.equal(drift(u), u)
    drift.elapsed = 100.0
    exponents = (u - drift(u)) / math.log(100.0)
    assert exponents.mean().item() == pytest.approx(0.05, rel=0.01)
    assert exponents.std().item() == pytest.approx(0.01, rel=0.03)
    drift.elapsed = 1e4
    torch.testing.assert_close((u - drift(u)) / math.log(1e4), exponents)


def test_pulses_are_whole_bounded_and_right_on_average():
    gradient = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimiser = physics.PulsedSGD([weight], lr=0.1, pulse=0.02, most=10, low=-0.15)
    total, draws = torch.zeros_like(gradient), 100
    for _ in range(draws):
        weight.data.zero_()
        weight.grad = gradient
        optimiser.step()
        pulses = weight.detach() / 0.02
        total += pulses
        free = weight.detach() > -0.15
        torch.testing.assert_close(pulses[free], pulses[free].round(), atol=1e-9, rtol=0)
        assert weight.min() >= -0.15
        assert pulses.max() <= 10 + 1e-9
    wanted = -0.1 * gradient / 0.02
    inside = (wanted > -7) & (wanted < 10)
    deviation = (total / draws - wanted)[inside]
    assert deviation.abs().max() < 6 * 0.5 / math.sqrt(draws)
    assert abs(deviation.mean().item()) < 6 * 0.5 / math.sqrt(draws * int(inside.sum()))


def test_pulses_to_the_nearest_lose_what_is_less_than_half_of_one():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([0.4, 0.6, -1.6])
    physics.PulsedSGD([weight], lr=1.0, pulse=1.0, seed=None).step()
    assert weight.tolist() == [0.0, -1.0, 2.0]


def test_readings_have_the_noise_and_the_steps_that_were_asked_for():
    truth = torch.linspace(-0.4, 0.4, 20000, dtype=torch.float64)
    noisy = recipes.NoisyInstrument(lambda current: truth, noise=1e-2)
    readings = noisy(torch.zeros(20000).double())
    assert (readings - truth).std().item() == pytest.approx(1e-2, rel=0.03)
    assert not torch.equal(noisy(torch.zeros(20000).double()), readings)
    converted = recipes.NoisyInstrument(lambda current: truth, bits=6, volts=0.5)(torch.zeros(20000).double())
    step = 1.0 / 2**6
    torch.testing.assert_close(converted / step, (converted / step).round())
    assert (converted - truth).abs().max() <= step / 2 + 1e-12


def test_wrappers_compose_on_a_network_and_the_gradient_is_that_of_the_device():
    network = learning_rules.initial(4, 0)
    plain = network.physical()["conductance"].detach()
    parametrize.register_parametrization(network, "log_conductance", physics.Quantised(4, 1e-6, 1e-3))
    device = physics.Mismatch(len(plain), 0.1)
    parametrize.register_parametrization(network, "log_conductance", device)
    expected = physics.Quantised(4, 1e-6, 1e-3)(plain.log()).exp() * device.factor.exp()
    torch.testing.assert_close(network.physical()["conductance"], expected)
    x, y = recipes.load("iris").x[:4], learning_rules.targets(recipes.load("iris").y[:4], 3)
    by_nudges = torch.cat(recipes.contrast(network, x, y))
    exact = learning_rules.exact(network, x, y)
    assert (by_nudges - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: physics.Quantised(0, 1e-6, 1e-3),
        lambda: physics.Quantised(2.5, 1e-6, 1e-3),
        lambda: physics.Quantised(2, 1e-3, 1e-6),
        lambda: physics.Quantised(2, 0.0, 1e-6),
        lambda: physics.Mismatch(3, -0.1),
        lambda: physics.Mismatch(3, float("nan")),
        lambda: physics.Drift(3, -0.1),
        lambda: physics.Drift(3, 0.1, spread=-1.0),
        lambda: physics.PulsedSGD([torch.zeros(1)], lr=0.0, pulse=1.0),
        lambda: physics.PulsedSGD([torch.zeros(1)], lr=1.0, pulse=-1.0),
        lambda: physics.PulsedSGD([torch.zeros(1)], lr=1.0, pulse=1.0, low=1.0, high=0.0),
        lambda: physics.PulsedSGD([torch.zeros(1)], lr=1.0, pulse=1.0, most=0),
        lambda: recipes.rules(0),
        lambda: recipes.devices(steps=0),
    ],
)
def test_options_are_checked(make):
    with pytest.raises(InvalidOptionError):
        make()


def test_the_rules_are_what_their_names_say():
    network = learning_rules.initial(4, 0)
    data = recipes.load("iris")
    x, y = data.x[:5], learning_rules.targets(data.y[:5], 3)
    exact = learning_rules.exact(network, x, y)
    found = {rule: torch.cat(recipes.contrast(network, x, y, rule)) for rule in ("ep", "coupled", "contrastive")}
    assert (found["ep"] - exact).norm() < 1e-2 * exact.norm()
    for rule in ("coupled", "contrastive"):
        assert torch.cosine_similarity(found[rule], exact, 0) > 0.8
        assert (found[rule] - exact).norm() > 0.05 * exact.norm()
    held = learning_rules._clamped(network, x, y, network.equilibrium(x))
    assert torch.equal(held[:, -3:], y)
    force = network.force(held, network.physical(), x)
    assert force[:, :-3].abs().max() < 1e-9 * force[:, -3:].abs().max()
    with pytest.raises(InvalidOptionError, match="rule"):
        recipes.contrast(network, x, y, "hebb")


def test_a_bias_adds_its_share_to_the_step_of_each_resistor():
    network = learning_rules.initial(4, 0)
    data = recipes.load("iris")
    x, y = data.x[:5], learning_rules.targets(data.y[:5], 3)
    bias = torch.linspace(-1e-3, 1e-3, len(network.resistors), dtype=torch.float64)
    conductance = network.physical()["conductance"].detach()
    for nudge in (0.1, 0.05):
        plain, biased = (
            torch.cat(recipes.contrast(network, x, y, "coupled", nudge=nudge, bias=each)) for each in (0.0, bias)
        )
        torch.testing.assert_close(biased - plain, conductance * bias / (2 * nudge), rtol=1e-6, atol=1e-15)


def test_the_error_that_a_bias_leaves_is_as_large_as_it_is_and_falls_with_the_nudge():
    x, target = torch.tensor([[1.0]]).double(), torch.tensor([[0.4]]).double()

    def left(nudge, bias):
        """The error of a divider whose upper resistor alone learns, where coupled learning ends."""
        divider = physics.ResistiveNetwork(1, 1, [(0, 1), (0, 2)], torch.tensor([1.0, 1.0]).double(), backward="ift")
        offset = torch.tensor([bias, 0.0]).double()
        for _ in range(60):
            step = recipes.contrast(divider, x, target, "coupled", nudge=nudge, bias=offset)[0]
            with torch.no_grad():
                divider.log_conductance[0] -= 5.0 * step[0]
        assert abs(float(step[0])) < 1e-10
        return float((target - divider.equilibrium(x)).detach())

    for nudge, bias in ((0.05, 1e-4), (0.05, 2e-4), (0.1, 1e-4), (0.1, -1e-4)):
        # There (x - v)(v' - v) = bias / 2 to first order, with v' - v the nudge's share of the error.
        assert left(nudge, bias) == pytest.approx(bias / (2 * nudge * 0.6), rel=0.02)


def test_one_step_of_each_rule_lowers_the_error():
    data = recipes.load("iris")
    x, y = data.x[:10], learning_rules.targets(data.y[:10], 3)
    for rule in ("ep", "coupled", "contrastive"):
        network = learning_rules.initial(4, 0)
        before = (network.equilibrium(x)[:, -3:] - y).square().sum()
        step = recipes.contrast(network, x, y, rule)
        with torch.no_grad():
            network.log_conductance -= 0.05 * step[0] / step[0].norm()
        assert (network.equilibrium(x)[:, -3:] - y).square().sum() < before


def test_what_noise_of_readings_adds_to_a_step_is_in_proportion_to_it():
    network, x = learning_rules.initial(4, 0), torch.randn(1000, 10)
    y = learning_rules.targets(torch.zeros(1000, dtype=torch.long), 3)
    clean = recipes.contrast(network, x, y)[0]
    added = []
    for noise in (1e-4, 2e-4):
        drawn = torch.Generator().manual_seed(0)
        added.append(float((recipes.contrast(network, x, y, noise=noise, generator=drawn)[0] - clean).norm()))
    assert added[0] > 1e-3 * float(clean.norm())
    assert added[1] / added[0] == pytest.approx(2.0, rel=0.1)


def test_the_recipe_of_devices_measures_and_draws_what_it_says(tmp_path):
    path = tmp_path / "devices.svg"
    found = recipes.devices(
        (2, 8),
        (0.0, 2.0),
        (1e-3,),
        (1.0, 1e3),
        (0,),
        steps=2,
        n_hidden=3,
        batch=4,
        path=str(path),
        results=str(path) + ".json",
    )
    assert json.loads((tmp_path / "devices.svg.json").read_text())["accuracies"]["levels"]["2"] == found["levels"][2]
    assert {name: list(values) for name, values in found.items()} == {
        "levels": [2, 8],
        "pulses": [2, 8],
        "in place": [0.0, 2.0],
        "written": [0.0, 2.0],
        "noise": [1e-3],
        "drifted": [1.0, 1e3],
        "retrained": [1.0, 1e3],
        "ideal": [0.1, 0.5, 1.0],
    }
    assert found["in place"][0.0] == found["written"][0.0] == found["drifted"][1.0] == found["ideal"][1.0]
    assert all(0 <= value <= 1 for values in found.values() for each in values.values() for value in each)
    assert "<svg" in path.read_text()


@pytest.mark.slow
def test_training_in_place_makes_up_for_mismatch():
    found = recipes.devices((), (1.0,), (), (), steps=30)
    assert sum(found["in place"][1.0]) > sum(found["written"][1.0])
