"""States and parameters in any form."""

from collections import OrderedDict
from collections.abc import Iterator, ValuesView
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MapChangedError


class ArrayLike:
    """Numbers of another library, which NumPy can read."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


@pytest.mark.parametrize("form", [list, ArrayLike, lambda values: [np.asarray(value) for value in values]])
def test_a_state_in_any_form_that_numpy_reads(form):
    stiffness = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)

    def solve(current):
        return form((1 + current.expand(2)).numpy() / stiffness.detach().numpy())

    z = tep.attach_equilibrium(solve, lambda z, k, x: 1 - k * z, stiffness)
    z.sum().backward()
    assert torch.allclose(stiffness.grad, -1 / stiffness.detach() ** 2)


# --- parameters in any form ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    stiffness: torch.Tensor
    load: torch.Tensor


@dataclass
class Record:
    stiffness: torch.Tensor
    load: torch.Tensor
    name: str = "springs"


class Springs(torch.nn.Module):
    def __init__(self, stiffness, load):
        super().__init__()
        self.stiffness, self.load = torch.nn.Parameter(stiffness), torch.nn.Parameter(load)


def _of_pair(theta):
    return tuple(theta)


def _by_name(theta):
    return theta["stiffness"], theta["load"]


def _by_attribute(theta):
    return theta.stiffness, theta.load


CONTAINERS = {
    "list": (lambda k, p: [k, p], _of_pair, _of_pair),
    "namedtuple": (Pair, _by_attribute, _by_attribute),
    "dictionary": (lambda k, p: {"stiffness": k, "load": p}, _by_name, _by_name),
    "ordered dictionary": (lambda k, p: OrderedDict(stiffness=k, load=p), _by_name, _by_name),
    "read-only dictionary": (lambda k, p: MappingProxyType({"stiffness": k, "load": p}), _by_name, _by_name),
    "values of a dictionary": (lambda k, p: {"stiffness": k, "load": p}.values(), _of_pair, _of_pair),
    "generator": (lambda k, p: (t for t in (k, p)), _of_pair, _of_pair),
    "dataclass": (Record, _by_attribute, _by_attribute),
    "ParameterList": (lambda k, p: torch.nn.ParameterList([k, p]), _of_pair, _of_pair),
    "ParameterDict": (lambda k, p: torch.nn.ParameterDict({"stiffness": k, "load": p}), _by_name, _by_name),
    "module": (Springs, _by_attribute, _by_name),
    "nested": (
        lambda k, p: {"a": [Springs(k, p)], "b": 3.0},
        lambda t: _by_attribute(t["a"][0]),
        lambda t: _by_name(t["a"][0]),
    ),
}


def _system(make, read):
    stiffness = torch.nn.Parameter(torch.tensor([2.0, 4.0], dtype=torch.float64))
    load = torch.nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.float64))
    theta = make(stiffness, load)
    if not isinstance(theta, (Iterator, ValuesView)):
        stiffness, load = read(theta)  # a module holds parameters of its own

    def solve(current):
        return ((load + current) / stiffness).detach()

    def force(z, theta, x):
        k, p = read(theta)
        return p - k * z

    return solve, force, theta, stiffness, load


@pytest.mark.parametrize("name", CONTAINERS)
def test_parameters_in_any_container(name):
    make, read, read_result = CONTAINERS[name]
    solve, force, theta, stiffness, load = _system(make, read)
    reports = []
    z = tep.attach_equilibrium(solve, force, theta, repeats=2, writer=reports.append)
    z.sum().backward()
    assert torch.allclose(stiffness.grad, -(load / stiffness**2).detach())
    assert torch.allclose(load.grad, (1 / stiffness).detach())
    for result in (reports[0].standard_error, reports[0].interval()[0]):
        errors = read_result(result)
        assert [error.shape for error in errors] == [stiffness.shape, load.shape]
        assert not any(isinstance(error, torch.nn.Parameter) or error.requires_grad for error in errors)
        assert max(float(error.max()) for error in errors) < 1e-6


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_step_of_an_optimiser_between_the_phases_is_noticed(name):
    make, read, _ = CONTAINERS[name]
    solve, force, theta, stiffness, load = _system(make, read)
    optimiser = torch.optim.SGD([stiffness, load], lr=0.1)
    z = tep.attach_equilibrium(solve, force, theta)
    stiffness.grad, load.grad = torch.ones_like(stiffness), torch.ones_like(load)
    optimiser.step()
    with pytest.raises(MapChangedError, match="written into"):
        z.sum().backward()


def test_another_tensor_in_the_container_is_noticed():
    make, read, _ = CONTAINERS["dictionary"]
    solve, force, theta, _, _ = _system(make, read)
    z = tep.attach_equilibrium(solve, force, theta)
    theta["load"] = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(MapChangedError):
        z.sum().backward()


@pytest.mark.parametrize(
    "theta", [object(), {1, 2}, [torch.ones(1), object()], {"k": lambda: 1}, [iter([torch.ones(1)])]]
)
def test_what_is_not_recognised_is_refused(theta):
    with pytest.raises(InvalidOptionError, match=r"theta has an? "):
        tep.attach_equilibrium(lambda current: torch.ones(2), lambda z, k, x: z, theta)
    with pytest.raises(InvalidOptionError, match=r"theta has an? "):
        tep.sensitivities(lambda current: torch.ones(2), lambda z, k, x: z, theta)
