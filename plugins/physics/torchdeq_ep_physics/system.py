"""What every physical network has: a force law, an equilibrium, a map for torchdeq, a metric, perhaps an energy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq.solver import get_solver

import torchdeq_ep as tep
from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.extend import ModeLike, RelaxedMode, check_choice
from torchdeq_ep_physics.annealing import Annealing
from torchdeq_ep_physics.checks import OnFailure, StateReport, measured, speak_up
from torchdeq_ep_physics.drawing import figure
from torchdeq_ep_physics.matrices import DenseMatrix, Matrix
from torchdeq_ep_physics.newton import Search, Settled, find, stability
from torchdeq_ep_physics.nudges import by_factor

Theta = dict[str, Tensor]


class NoEnergyError(EPError, TypeError):
    """The force of a system is not the gradient of any energy."""


class PhysicalSystem(nn.Module, ABC):
    """A network of physical elements as a torch layer: the input goes in, the equilibrium comes out.

    The state `z` has shape `(batch, n_states)`. At equilibrium `force(z, theta, x) = 0`. Out of it, the state flows by
    `capacity dz/dt = force`; [`map`][torchdeq_ep_physics.PhysicalSystem.map] is a step of that flow. Parameters are
    kept so that they stay physical: [`physical`][torchdeq_ep_physics.PhysicalSystem.physical] returns positive ones.

    The force and the stability of every state are measured: [`last`][torchdeq_ep_physics.PhysicalSystem.last] has them.
    A state that is no equilibrium is an error, and an unstable one a warning.

    Args:
        n_states: Entries of the state of one sample.
        solver: `"newton"`, for the free phase and the nudged ones, on the network's own matrix; or the name of a
            torchdeq solver for the free phase, while the backward mode has its own.
        backward: Backward mode, by name or as a mode; the metric is added to it.
        capacity: Capacitance or viscosity of each entry; positive, of shape `(n_states,)`. By default each entry has
            the one with which it would relax in a single step if the others stood still.
        step: Length of a step of the flow, in units of time if a capacity is given.
        max_iter: Largest number of steps of a torchdeq solver, and of the backward mode.
        tol: Tolerance of a torchdeq solver.
        annealing: Thermal motion before the search, which finds lower minima of a rugged energy; `None` for none.
        on_failure: `"raise"` raises where no equilibrium is found; `"warn"` returns the states as they are, with a
            warning.
    """

    reciprocal = True
    """Whether the force has an energy, so that equilibrium propagation is exact."""

    capacity: Tensor | None

    largest_step: float = float("inf")
    """No entry moves further in one step of Newton's method."""

    origin: float = 0.0
    """Added to a state before its size is asked for: a relative nudge moves it by a share of that size."""

    advice: str = "Use smaller inputs or nudges, or another start."
    """What is likely to be wrong where no equilibrium is found, and what to do."""

    last: StateReport | None = None
    """What was measured of the states that were last returned."""

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
        annealing: Annealing | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if capacity is not None and (capacity.shape != (n_states,) or not bool((capacity > 0).all())):
            raise InvalidOptionError(f"capacity must be a positive tensor of shape ({n_states},).")
        if not step > 0:
            raise InvalidOptionError(f"step must be positive, not {step!r}.")
        check_choice("on_failure", on_failure, ("raise", "warn"))
        self.n_states = n_states
        self.solver = solver
        self.backward = backward
        self.step = step
        self.max_iter = max_iter
        self.tol = tol
        self.annealing = annealing
        self.on_failure: OnFailure = on_failure
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

    def prepared(self, theta: Theta) -> Theta:
        """The parameters, and whatever of them is worth computing only once in a search for an equilibrium."""
        return theta

    def stiffness_matrix(self, z: Tensor, theta: Theta, x: Tensor) -> Matrix:
        """`-d force / d z` of each sample."""

        def one(z: Tensor, x: Tensor) -> Tensor:
            return -self.force(z.unsqueeze(0), theta, x.unsqueeze(0)).squeeze(0)

        values = torch.vmap(torch.func.jacrev(one))(z, x)
        return DenseMatrix(values, values if self.reciprocal else None)

    def limited(self, z: Tensor, move: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """A move of Newton's method, shortened where the force is known to bend on the way."""
        return move

    def largest_term(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The largest of the terms that make up the force of each sample, which a net force is compared with."""
        return (self.stiffness(z, theta, x) * z).abs().amax(1)

    def conjugate(self, z: Tensor) -> Tensor:
        """The coordinate by which the negative gradient of the energy is the force."""
        return z

    def conjugate_slope(self, z: Tensor) -> Tensor:
        """Its derivative by the state, positive, entry by entry."""
        return torch.ones_like(z)

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
            NoEquilibriumError: If none is found, unless `on_failure="warn"`.
        """
        return self._solved(x, current, self.physical() if theta is None else theta, start).z

    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """The free equilibrium, with the gradient of the backward mode.

        Args:
            x: Input of shape `(batch, ...)`.
            start: Where the search starts, by default at [`start`][torchdeq_ep_physics.PhysicalSystem.start].

        Returns:
            The state, of shape `(batch, n_states)`.

        Raises:
            NoEquilibriumError: If none is found, unless `on_failure="warn"`.
        """
        theta = self.prepared(self.physical())
        x = _in_precision_of(theta, x)
        found = self._solved(x, 0.0, theta, start)
        z = found.z
        if not torch.is_grad_enabled():
            return z
        mode = self.mode(x, theta)
        if self.solver == "newton" and isinstance(mode, RelaxedMode) and mode.solver is None:
            with torch.no_grad():
                mobility, metric = (quantity(z, theta, x).detach() for quantity in (self.mobility, self.metric))
            mode = by_factor(mode, found.stability.factor, mobility, metric)
        return tep.attach(self.map(x, theta), z + self.origin, backward=mode) - self.origin

    def mode(
        self,
        x: Tensor,
        theta: Theta | None = None,
        backward: str | ModeLike | None = None,
    ) -> ModeLike:
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
        values = {name: value.detach() for name, value in (self.physical() if theta is None else theta).items()}
        held = x.detach()
        if isinstance(mode, (tep.EquilibriumPropagation, tep.InfinitesimalEP)) and mode.metric is None:
            mode = replace(mode, metric=lambda z: self.metric(z, values, held))
        return mode

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

    @torch.no_grad()
    def _solved(self, x: Tensor, current: Tensor | float, theta: Theta, start: Tensor | None) -> Settled:
        """A state, found, measured and spoken of."""
        values = {name: value.detach() for name, value in theta.items()}
        x = _in_precision_of(theta, x.detach())
        z = _in_precision_of(theta, (self.start(x) if start is None else start).detach())
        force = torch.as_tensor(current, dtype=z.dtype, device=z.device).detach().expand(z.shape)
        problem = Search(self, self.prepared(values), x.expand(len(z), *x.shape[1:]), force)
        if self.annealing is not None:
            z = self.annealing.run(problem, z)
        if self.solver == "newton":
            found = find(problem, z)
        else:
            z = self._by_torchdeq(problem, z)
            found = Settled(z, stability(problem, z), 0, 0)
        self.last = measured(problem, found)
        speak_up(self.last, type(self).__name__, self.advice, self.on_failure)
        return found

    def _by_torchdeq(self, problem: Search, z: Tensor) -> Tensor:
        flow = self.map(problem.x, problem.theta)

        def nudged(z: Tensor) -> Tensor:
            return flow(z) + self.mobility(z, problem.theta, problem.x) * problem.current

        options: dict[str, Any] = {"max_iter": self.max_iter, "tol": self.tol, "stop_mode": "rel"}
        solution: Tensor = get_solver(self.solver)(nudged, z, **options)[0]
        return solution


def _in_precision_of(theta: Theta, values: Tensor) -> Tensor:
    """Values in the dtype of the parameters."""
    return values.to(reduce(torch.promote_types, (each.dtype for each in theta.values())))


def positive(values: Tensor) -> nn.Parameter:
    """A parameter that holds the logarithm of positive values."""
    if not bool((values > 0).all()):
        raise InvalidOptionError("conductances, stiffnesses and lengths must be positive.")
    return nn.Parameter(values.log())
