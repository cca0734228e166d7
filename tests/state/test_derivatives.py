import subprocess
import sys

import torch

from torchdeq_ep.state import forward_derivative


def test_it_is_the_derivative_and_builds_no_graph():
    point, direction = torch.randn(2, 5, dtype=torch.float64)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    derivative = forward_derivative(lambda z: torch.tanh(weight @ z), point, direction)
    step = 1e-6 * direction
    difference = (torch.tanh(weight @ (point + step)) - torch.tanh(weight @ (point - step))) / 2e-6
    assert not derivative.requires_grad
    torch.testing.assert_close(derivative, difference.detach(), rtol=1e-7, atol=1e-9)


def test_the_first_use_of_forward_mode_says_nothing():
    """Torch compiles formulas then, and deprecates its own way to do so: with 2.14 where users see it."""
    code = """
import warnings
import torch, torchdeq_ep as tep
warnings.simplefilter("error")
tep.get_backward("ep-infinitesimal")(lambda z: 0.5 * torch.tanh(z), torch.zeros(3), torch.ones(3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
