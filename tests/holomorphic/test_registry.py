"""Which operations have a rule, and how one registers more."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchdeq_ep as tep
from torchdeq_ep import holomorphic
from torchdeq_ep.errors import InvalidOptionError, NotHolomorphicError
from torchdeq_ep.holomorphic import registry


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        return torch.from_numpy(x.detach().numpy() * factor)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


def test_register_rule_of_an_autograd_function():
    z = torch.tensor([1 + 1j])
    with pytest.raises(NotHolomorphicError, match="numpy"), holomorphic.mode():
        Doubled.apply(z, 2)
    holomorphic.register_rule(Doubled, lambda x, factor: x * factor)
    with holomorphic.mode():
        value = Doubled.apply(z, 2)
    assert value == 2 + 2j
    with tep.state.FrozenStatistics():
        assert Doubled.apply(torch.ones(1), 2) == 2
    with pytest.raises(InvalidOptionError, match="overwrite"):
        holomorphic.register_rule(Doubled, lambda x, factor: x)
    holomorphic.register_rule(Doubled, lambda x, factor: x * factor * 2, overwrite=True)
    with holomorphic.mode():
        value = Doubled.apply(z, 2)
    assert value == 4 + 4j
    assert "`Doubled`" in holomorphic.rules_table()


@torch.library.custom_op("tep_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


def test_register_rule_of_a_library_operator():
    z = torch.tensor([1 + 1j])
    with pytest.raises(NotHolomorphicError, match="cube"), holomorphic.mode():
        torch.ops.tep_test.cube(z)
    holomorphic.register_rule(torch.ops.tep_test.cube, lambda x: x**3)
    with holomorphic.mode():
        values = torch.ops.tep_test.cube(z), torch.ops.tep_test.cube.default(z)
    assert values[0] == values[1] == -2 + 2j


def test_register_rule_refuses_to_replace_silently():
    for op in (torch.abs, torch.softmax):
        with pytest.raises(InvalidOptionError, match="overwrite"):
            holomorphic.register_rule(op, lambda x: x)
    with pytest.raises(InvalidOptionError, match="callable"):
        holomorphic.register_rule("abs", lambda x: x)


ROOT = Path(__file__).parents[2]


def test_every_declared_name_exists():
    """A misspelt name would silently leave an operation refused."""
    spelt = {policy.name for policy in registry._POLICIES.values()}
    assert registry._BY_NAME.keys() - {f"{name}_" for name in registry._BY_NAME} <= spelt


def test_page_of_the_documentation_is_the_table():
    """A fresh process: other tests register rules of their own."""
    table = subprocess.run(
        [sys.executable, "-m", "torchdeq_ep.holomorphic"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    page = ROOT / "docs" / "holomorphic-rules.md"
    assert page.read_text() == table, "run: python -m torchdeq_ep.holomorphic > docs/holomorphic-rules.md"


def test_table_lists_every_rule():
    table = holomorphic.rules_table()
    for name in ("softmax", "scaled_dot_product_attention", "conv_transpose3d", "gelu", "dsilu", "max_pool2d", "abs"):
        assert f"`{name}`" in table
