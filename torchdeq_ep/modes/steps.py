"""The second form of mode: one that differentiates steps of the map instead of solving an equation.

A mode of the first form is `(f, z*, g) -> v`. One of this form is asked in the forward pass for a state with its graph:
autograd then makes the gradient, through as many steps as that graph holds. The layer keeps the value that it had.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from torchdeq_ep._options import check_count, check_damping
from torchdeq_ep.errors import MissingHistoryError
from torchdeq_ep.modes.base import Mode
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.relaxation.kept import Need
from torchdeq_ep.state import Equilibrium, FrozenStatistics, Map, Memory


@dataclass(frozen=True)
class Path:
    """Where a mode of the second form starts from.

    Args:
        f: The map, on packed states; each call builds a graph.
        z: Packed state that the steps start from: the `z*` of the solver.
        value: `f(z)`, with its graph.
        history: What the solver left for the mode, see [`Mode.needs`][torchdeq_ep.extend.Mode], or `None`.
        memory: Of the layer.

    Example:
        >>> z = torch.zeros(2)
        >>> Path(torch.cos, z, torch.cos(z)).history is None
        True
    """

    f: Map
    z: Tensor
    value: Tensor
    history: object = None
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class StepwiseMode(Mode):
    """Base class of modes of the second form.

    Example:
        >>> issubclass(Phantom, StepwiseMode)
        True
    """

    at_equilibrium: ClassVar[bool] = False

    @abstractmethod
    def follow(self, path: Path) -> Tensor:
        """The state whose gradient the layer is to have.

        Args:
            path: Where to start, and what the solver left.

        Returns:
            A packed state with its graph.
        """

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector in effect: the derivative of the end of the path by a constant force on the map."""
        calls = 0

        def forced(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            value: Tensor = equilibrium.f(z) + force
            return value

        with torch.enable_grad(), FrozenStatistics():
            force = torch.zeros_like(equilibrium.z, requires_grad=True)
            start = equilibrium.z.detach().requires_grad_()
            end = self.follow(Path(forced, start, forced(start), equilibrium.history))
            (vector,) = torch.autograd.grad(end, force, equilibrium.cotangent)
        return vector, NudgeReport(repr(self), calls=2 * calls, iterations=calls)


@dataclass(frozen=True)
class Unrolled(StepwiseMode):
    """Backpropagation through steps of the map (BPTT): the gradient of what was computed, not of an equilibrium.

    In `tep.loop` these are the last `k` steps that the loop made, and nothing is computed twice: full
    BPTT without `k`, truncated BPTT with it (Williams & Peng 1990). Elsewhere they are `k` further steps from `z*`,
    taken for the sake of the gradient. Memory grows with `k`.

    Args:
        k: Number of steps; `None` for all that were made, through the solver if there is one.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> Unrolled(k=3)(lambda z: 0.5 * z, torch.zeros(1), torch.ones(1))
        tensor([1.7500])
    """

    k: int | None = None

    def __post_init__(self) -> None:
        if self.k is not None:
            check_count("k", self.k)

    @property
    def needs(self) -> Need | None:
        return "steps" if self.k is None else None

    def follow(self, path: Path) -> Tensor:
        if self.k is None:
            if not isinstance(path.history, Trajectory):
                raise MissingHistoryError(
                    "'unrolled' without a number of steps differentiates those that were made, and here nobody kept "
                    "them. Say how many steps from z* it is to take ('unrolled:k=10'), run the loop by tep.loop(...), "
                    "or switch a DEQ by tep.use_backward."
                )
            return path.history.follow(path.f)
        return damped_steps(path, self.k, 1.0)


@dataclass(frozen=True)
class Trajectory:
    """How a solver went, for a mode that differentiates all of it.

    Args:
        follow: From the map to the value of the layer, with the graph of all steps.
    """

    follow: Callable[[Map], Tensor]


@dataclass(frozen=True)
class Phantom(StepwiseMode):
    """The phantom gradient of torchdeq: `k` damped steps `z <- tau f(z) + (1 - tau) z` from `z*`, differentiated.

    The same gradient as that of `torchdeq.get_deq(grad=k, tau=tau)`, in its unrolled form, UPG (Geng et al. 2021, arXiv
    2111.05177); but the layer keeps the value at `z*`, and does not return that of the last damped step. At an
    equilibrium it is the gradient of [`Neumann`][torchdeq_ep.modes.Neumann]; where the solver stopped early, each step
    is differentiated where it is.

    Args:
        k: Number of steps.
        tau: Damping, above 0 and up to 1.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> Phantom(k=1, tau=0.5)(lambda z: 0.5 * z, torch.zeros(1), torch.ones(1))
        tensor([0.5000])
    """

    k: int = 5
    tau: float = 0.5

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_damping(self.tau)

    def follow(self, path: Path) -> Tensor:
        return damped_steps(path, self.k, self.tau)


def damped_steps(path: Path, k: int, tau: float) -> Tensor:
    """`k` steps `z <- tau f(z) + (1 - tau) z` with their graph, of which the first is known but for its damping.

    Args:
        path: Where they start.
        k: Number of steps.
        tau: Damping.

    Returns:
        The last state.

    Example:
        >>> z = torch.ones(1)
        >>> damped_steps(Path(lambda z: 0.5 * z, z, 0.5 * z), 2, 0.5)
        tensor([0.5625])
    """
    z, value = path.z, path.value
    for step in range(k):
        value = path.f(z) if step else value
        z = value if tau == 1.0 else tau * value + (1 - tau) * z
    return z
