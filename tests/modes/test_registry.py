"""Names, specs, and modes that other distributions bring."""

from importlib.metadata import EntryPoint

import pytest
import torch
from problems import tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, UnknownBackwardError
from torchdeq_ep.modes import Neumann, Phantom, Unrolled, registry
from torchdeq_ep.modes.schedules import Online
from torchdeq_ep.plugins import BACKWARDS

NAMES = ("ift", "ep-one-sided", "ep", "ep-richardson", "hep", "hep-online", "ep-infinitesimal", "aep")
NAMES += ("one-step", "jfb", "neumann", "phantom", "unrolled", "gmres", "shine", "reversible")


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def test_the_modes_of_the_package():
    assert tep.available_backwards() == NAMES
    for name in NAMES:
        assert callable(tep.get_backward(name))
        assert registry.describe_backward(name)


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ("ep", tep.EquilibriumPropagation(tep.Stencil.symmetric())),
        ("ep:beta=0.1", tep.EquilibriumPropagation(tep.Stencil.symmetric(0.1))),
        (" ep : beta = 1e-3 , tol=1e-4", tep.EquilibriumPropagation(tep.Stencil.symmetric(1e-3), tol=1e-4)),
        ("ep:beta=auto,max_iter=None", tep.EquilibriumPropagation()),
        ("ep-one-sided:scale=absolute", tep.EquilibriumPropagation(tep.Stencil.one_sided(), scale="absolute")),
        ("ep-one-sided:direction=up", tep.EquilibriumPropagation(tep.Stencil.one_sided(direction="up"))),
        (
            "ep-one-sided:direction=up,beta=0.5,scale=absolute",
            tep.EquilibriumPropagation(tep.Stencil.one_sided(0.5, "up"), scale="absolute"),
        ),
        ("ep-one-sided:direction=down", tep.EquilibriumPropagation("one-sided")),
        ("ep-richardson:order=6", tep.EquilibriumPropagation(tep.Stencil.richardson("auto", 6))),
        ("hep:n_points=6,beta=0.1", tep.EquilibriumPropagation(tep.Stencil.contour(0.1, 6))),
        ("hep-online", tep.EquilibriumPropagation(tep.Stencil.contour(), schedule="online")),
        (
            "hep-online:n_points=6,steps=60,periods=3",
            tep.EquilibriumPropagation(tep.Stencil.contour("auto", 6), schedule=Online(60, 3)),
        ),
        ("hep-online:steps=7", tep.EquilibriumPropagation(tep.Stencil.contour(), schedule=Online(steps=7))),
        ("aep:solver=broyden", tep.EquilibriumPropagation(correction="asymmetric", solver="broyden")),
        ("ift:max_iter=7", tep.ImplicitDifferentiation(max_iter=7)),
        ("neumann:k=3,tau=0.5", Neumann(3, 0.5)),
        ("phantom:k=2", Phantom(2, 0.5)),
        ("unrolled:k=4", Unrolled(4)),
        ("gmres:tol=0.1", tep.ImplicitDifferentiation(solver="gmres", tol=0.1)),
        ("ep-infinitesimal:correction=asymmetric", tep.InfinitesimalEP(correction="asymmetric")),
    ],
)
def test_specs(spec, mode):
    assert tep.get_backward(spec) == mode


def test_overrides_take_precedence():
    assert tep.get_backward("ep:tol=0.1", tol=0.2).tol == 0.2
    assert tep.get_backward(tep.get_backward("hep:n_points=6"), beta=0.2).stencil == tep.Stencil.contour(0.2, 6)
    assert tep.get_backward(tep.get_backward("ift"), tol=0.2) == tep.ImplicitDifferentiation(tol=0.2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("epp", "Did you mean 'ep'"),
        ("", "there are: aep, ep, ep-infinitesimal"),
        ("hep_online", "Did you mean 'hep-online'"),
        (3, "not 3"),
        (None, "not None"),
    ],
)
def test_unknown_modes(spec, message):
    with pytest.raises(UnknownBackwardError, match=message):
        tep.get_backward(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ep:betta=0.1", "Did you mean 'beta'"),
        ("ift:beta=0.1", "unknown option 'beta'"),
        ("ep-one-sided:direction=sideways", "direction"),
        ("ep:direction=up", "unknown option 'direction'"),
        ("ep:n_points=4", "unknown option 'n_points'"),
        ("ep:stencil=symmetric", "unknown option 'stencil'"),
        ("ep:beta", "key=value"),
        ("ep:=0.1", "key=value"),
        ("ep:beta=0.1,beta=0.2", "twice"),
        ("ep:beta=0", "beta must be"),
        ("ep:beta=small", "beta must be"),
        ("hep:n_points=2.5", "n_points"),
        ("hep-online:steps=0", "steps of an online"),
        ("hep-online:periods=1.5", "periods of an online"),
        ("hep-online:steps=9,schedule=parallel", "leave out one"),
        ("hep:steps=9", "unknown option 'steps'"),
        ("ep-richardson:order=5", "order"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InvalidOptionError, match=message):
        tep.get_backward(spec)


def test_bad_overrides_of_a_mode():
    with pytest.raises(InvalidOptionError, match="Did you mean 'tol'"):
        tep.get_backward(tep.get_backward("ift"), toll=0.1)
    with pytest.raises(InvalidOptionError, match="build it with them"):
        tep.get_backward(lambda f, z, g: g, tol=0.1)


def jacobian_free(*, gain=1.0):
    """One step."""
    return lambda f, z, g: gain * g


@pytest.mark.usefixtures("_registry")
def test_registering():
    tep.register_backward("jacobian-free", jacobian_free)
    assert tep.available_backwards()[-1] == "jacobian-free"
    assert registry.describe_backward("jacobian-free") == "One step."
    problem = tanh_problem()
    assert torch.equal(tep.get_backward("jacobian-free:gain=2")(problem.f, problem.z, problem.g), 2 * problem.g)
    with pytest.raises(InvalidOptionError, match="Did you mean 'gain'"):
        tep.get_backward("jacobian-free:gains=2")
    with pytest.raises(InvalidOptionError, match="overwrite=True"):
        tep.register_backward("jacobian-free", jacobian_free)
    tep.register_backward("ep", jacobian_free, overwrite=True)
    assert tep.get_backward("ep")(None, None, problem.g) is not None


@pytest.mark.parametrize(("name", "factory"), [("a:b", jacobian_free), ("", jacobian_free), ("fine", "text")])
@pytest.mark.usefixtures("_registry")
def test_registering_nonsense(name, factory):
    with pytest.raises(InvalidOptionError):
        tep.register_backward(name, factory)


@pytest.mark.usefixtures("_registry")
def test_entry_points(monkeypatch):
    found = (
        EntryPoint("other", f"{__name__}:jacobian_free", BACKWARDS),
        EntryPoint("broken", "no_such_module:factory", BACKWARDS),
        EntryPoint("ep", f"{__name__}:jacobian_free", BACKWARDS),
    )
    monkeypatch.setattr(registry, "entries", lambda group: found)
    assert tep.available_backwards()[-2:] == ("other", "broken")
    monkeypatch.setattr(EntryPoint, "load", lambda self: {"other": jacobian_free}[self.name])
    assert isinstance(tep.get_backward("ep"), tep.EquilibriumPropagation)
    assert tep.get_backward("other:gain=3")(None, None, 2.0) == 6.0
    with pytest.raises(UnknownBackwardError, match="cannot be imported"):
        tep.get_backward("broken")
