"""What every physical network has: a force law, an equilibrium, a map for torchdeq, a metric, perhaps an energy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq.solver import get_solver

import torchdeq_ep as tep
from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.extend import ModeLike, RelaxedMode
from torchdeq_ep_physics.drawing import figure

Theta = dict[str, Tensor]

_NEWTON_STEPS = 200
_CLOSE = 1e3


class NoEnergyError(EPError, TypeError):
    """The force of a system is not the gradient of any energy."""


class NoEquilibriumError(EPError, RuntimeError):
    """The search for an equilibrium of a physical network did not converge."""


class PhysicalSystem(nn.Module, ABC):
    """A network of physical elements as a torch layer: the input goes in, the equilibrium comes out.

    The state `z` has shape `(batch, n_states)`. At equilibrium `force(z, theta, x) = 0`. Out of it, the state flows by
    `capacity dz/dt = force`; [`map`][torchdeq_ep_physics.PhysicalSystem.map] is a step of that flow. Parameters are
    kept so that they stay physical: [`physical`][torchdeq_ep_physics.PhysicalSystem.physical] returns positive ones.

    Args:
        n_states: Entries of the state of one sample.
        solver: How the free phase is solved: `"newton"`, by dense implicit steps, or the name of a torchdeq solver.
        backward: Backward mode, by name or as a mode; the metric is added to it.
        capacity: Capacitance or viscosity of each entry; positive, of shape `(n_states,)`. By default each entry has
            the one with which it would relax in a single step if the others stood still.
        step: Length of a step of the flow, in units of time if a capacity is given.
        max_iter: Largest number of steps of a torchdeq solver, and of the backward mode.
        tol: Tolerance of a torchdeq solver.
    """

    reciprocal = True
    """Whether the force has an energy, so that equilibrium propagation is exact."""

    capacity: Tensor | None

    largest_step: float = float("inf")
    """No entry moves further in one implicit step."""

    def __init__(
        self,
        n_states: int,
        *,
        solver: str = "newton",
        backward: str | ModeLike = "ep",
        capacity: Tensor | None = None,
        step: float = 1.0,
        max_iter: int = 500,
        tol: float = 1e-10,
    ) -> None:
        super().__init__()
        if capacity is not None and (capacity.shape != (n_states,) or not bool((capacity > 0).all())):
            raise InvalidOptionError(f"capacity must be a positive tensor of shape ({n_states},).")
        if not step > 0:
            raise InvalidOptionError(f"step must be positive, not {step!r}.")
        self.n_states = n_states
        self.solver = solver
        self.backward = backward
        self.step = step
        self.max_iter = max_iter
        self.tol = tol
        self.register_buffer("capacity", capacity)

    @abstractmethod
    def physical(self) -> Theta:
        """The parameters as physical quantities, with their graph to the trained ones."""

    @abstractmethod
    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The force law, of the shape of the state; local: a parameter acts on the entries that it connects."""

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The energy of each sample, whose negative gradient is the force.

        Raises:
            NoEnergyError: If there is none.
        """
        raise NoEnergyError(f"{type(self).__name__} has no energy: its force is not reciprocal.")

    @abstractmethod
    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """A positive scale of `-d force_i / d z_i`, of a shape that broadcasts to the state."""

    def start(self, x: Tensor) -> Tensor:
        """Where the search for the free equilibrium starts."""
        return x.new_zeros(len(x), self.n_states)

    def mobility(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """`step / capacity`, of the shape of the state."""
        capacity = self.stiffness(z, theta, x) if self.capacity is None else self.capacity
        return (torch.full_like(capacity, self.step) / capacity).expand(z.shape)

    def metric(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The positive diagonal `M` for which `J M` of the map is symmetric: the mobility."""
        return self.mobility(z, theta, x)

    def map(self, x: Tensor, theta: Theta | None = None) -> Callable[[Tensor], Tensor]:
        """The map whose fixed point is the equilibrium, for torchdeq and for [`attach`][torchdeq_ep.node.attach].

        Args:
            x: Input of shape `(batch, ...)`.
            theta: Physical parameters, by default those of the module.

        Returns:
            `z -> z + mobility * force`.
        """
        values = self.physical() if theta is None else theta

        def flow(z: Tensor) -> Tensor:
            return z + self.mobility(z, values, x) * self.force(z, values, x)

        return flow

    @torch.no_grad()
    def equilibrium(
        self,
        x: Tensor,
        current: Tensor | float = 0.0,
        theta: Theta | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """The equilibrium under an added force, without a gradient: a solver for `attach_equilibrium`.

        Args:
            x: Input of shape `(batch, ...)`.
            current: The added force, which broadcasts to the state.
            theta: Physical parameters, by default those of the module.
            start: Where the search starts, by default at [`start`][torchdeq_ep_physics.PhysicalSystem.start].

        Returns:
            The state, of shape `(batch, n_states)`.

        Raises:
            NoEquilibriumError: If the implicit steps do not converge.
        """
        values = {name: value.detach() for name, value in (self.physical() if theta is None else theta).items()}
        if self.solver == "newton":
            return self._newton(x.detach(), current, values, self.start(x) if start is None else start)
        flow, x = self.map(x.detach(), values), x.detach()
        z = self.start(x) if start is None else start

        def nudged(z: Tensor) -> Tensor:
            return flow(z) + self.mobility(z, values, x) * current

        options: dict[str, Any] = {"max_iter": self.max_iter, "tol": self.tol, "stop_mode": "rel"}
        solution: Tensor = get_solver(self.solver)(nudged, z, **options)[0]
        return solution

    def forward(self, x: Tensor) -> Tensor:
        """The free equilibrium, with the gradient of the backward mode.

        Args:
            x: Input of shape `(batch, ...)`.

        Returns:
            The state, of shape `(batch, n_states)`.
        """
        theta = self.physical()
        z = self.equilibrium(x, theta=theta)
        return tep.attach(self.map(x, theta), z, backward=self.mode(x, theta))

    def mode(self, x: Tensor, theta: Theta | None = None, backward: str | ModeLike | None = None) -> ModeLike:
        """The backward mode with the metric of this system at an input.

        Args:
            x: Input of shape `(batch, ...)`.
            theta: Physical parameters, by default those of the module.
            backward: Another mode than that of the module.

        Returns:
            A backward mode.
        """
        mode = tep.get_backward(self.backward if backward is None else backward)
        if isinstance(mode, RelaxedMode) and mode.max_iter is None:
            mode = replace(mode, max_iter=self.max_iter)
        if not isinstance(mode, (tep.EquilibriumPropagation, tep.InfinitesimalEP)) or mode.metric is not None:
            return mode
        values = {name: value.detach() for name, value in (self.physical() if theta is None else theta).items()}
        held = x.detach()
        return replace(mode, metric=lambda z: self.metric(z, values, held))

    def plot(self, path: str, x: Tensor, cotangent: Tensor, amplitude: float = 0.1) -> None:
        """Draw one sample in its free state and nudged along a cotangent.

        Args:
            path: Where to write the picture (.png, .svg, .pdf).
            x: Input of shape `(1, ...)`.
            cotangent: Direction of the nudge, of the shape of the state.
            amplitude: How far the nudge moves the state, relative to its norm (to first order).
        """
        theta = self.physical()
        free = self.equilibrium(x, theta=theta)
        # A weak nudge first: it shows how strong the wanted one must be.
        weak = 1e-4 * free.norm() / cotangent.norm() * self.stiffness(free, theta, x).detach().mean() * cotangent
        trial = self.equilibrium(x, weak, theta=theta)
        factor = amplitude * free.norm() / (trial - free).norm()
        nudged = self.equilibrium(x, factor * weak, theta=theta)
        drawn, axes = figure(1, 2)
        for axis, state, title in zip(axes, (free, nudged), ("free", "nudged"), strict=True):
            self.sketch(axis, state[0].detach(), x)
            axis.set_title(title)
        drawn.savefig(path, dpi=120)

    def sketch(self, axes: Any, z: Tensor, x: Tensor) -> None:
        """Draw one state, of shape `(n_states,)`, into matplotlib axes."""
        axes.bar(range(self.n_states), z.tolist(), color="tab:blue")
        axes.set_xlabel("entry of the state")

    def _newton(self, x: Tensor, current: Tensor | float, theta: Theta, z: Tensor) -> Tensor:
        """Implicit steps of the flow, which become Newton's as the force vanishes and the steps grow.

        Pseudo-transient continuation (Kelley & Keyes 1998): unlike Newton's method it does not run into a saddle, and
        it needs no good start.
        """

        def one(z: Tensor, x: Tensor) -> Tensor:
            return self.force(z.unsqueeze(0), theta, x.unsqueeze(0)).squeeze(0)

        slope = torch.vmap(torch.func.jacrev(one))
        r = self.force(z, theta, x) + current
        duration = torch.ones(len(z), 1).to(z)
        for _ in range(_NEWTON_STEPS):
            friction = self.stiffness(z, theta, x).expand(z.shape) / duration
            move = torch.linalg.solve(torch.diag_embed(friction) - slope(z, x), r)
            longest = move.abs().amax(1, keepdim=True)
            z = z + move * (self.largest_step / longest).clamp_max(1.0)
            before, r = r, self.force(z, theta, x) + current
            if float(longest.max()) <= _CLOSE * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max())):
                return z
            if not bool(torch.isfinite(z).all()):
                break
            gain = before.norm(dim=1, keepdim=True) / r.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
            duration = (duration * gain.clamp(0.3, 10.0)).clamp(1e-2, 1e12)
        raise NoEquilibriumError(
            f"no equilibrium of {type(self).__name__} was found in {_NEWTON_STEPS} implicit steps: the largest force "
            f"left is {float(r.abs().max()):.1e}. Use smaller inputs or nudges, or a torchdeq solver "
            "(solver='anderson')."
        )


def positive(values: Tensor) -> nn.Parameter:
    """A parameter that holds the logarithm of positive values."""
    if not bool((values > 0).all()):
        raise InvalidOptionError("conductances, stiffnesses and lengths must be positive.")
    return nn.Parameter(values.log())
