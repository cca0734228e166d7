"""The gradient of a netlist: from nudges where the circuit is reciprocal, from forward derivatives where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.errors import AsymmetryWarning, SolverError, TruncationWarning

NetlistRule = Literal["auto", "ep", "forward"]

MISMATCH = 0.01
"""The error of a gradient by nudges, along random changes of the parameters, from which on a circuit is one-way."""

_NOISE = 1e-9
_NUDGED = 1e-4
_CHANGED = 1e-3
_VISIBLE = 10.0


@dataclass(frozen=True)
class NetlistReport:
    """How a gradient of a netlist was found.

    Args:
        rule: `"ep"`, from nudges at the outputs, or `"forward"`, from a forward derivative by each parameter.
        mismatch: How far the gradient by nudges is from forward derivatives along a random change of the parameters,
            relative to the larger; NaN where it was not measured. 0 in reciprocal circuits.
        solves: Operating points that were asked for, of the whole batch each.

    Example:
        >>> NetlistReport("ep", 1e-5, 6).rule
        'ep'
    """

    rule: str
    mismatch: float
    solves: int


class NetlistLike(Protocol):
    """What the gradient needs of a netlist."""

    gradient: NetlistRule
    reciprocal: bool | None
    last: NetlistReport | None
    generator: torch.Generator

    def force(self, z: Tensor, theta: Any, x: Tensor | None = None) -> Tensor:
        """The terms of the law that depend on `theta` and `x`."""

    def operating_points(self, x: Tensor, theta: Tensor, current: Tensor | float = 0.0) -> Tensor:
        """The state under an added force."""

    def steps(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Natural sizes of changes of the parameters and of the inputs."""


class AtOperatingPoint(torch.autograd.Function):
    """The state of a netlist as a function of its parameters and inputs."""

    @staticmethod
    def forward(ctx: Any, circuit: NetlistLike, free: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        ctx.circuit = circuit
        ctx.save_for_backward(free, theta, x)
        return free.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        free, theta, x = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[3]
        phase = BackwardPhase(ctx.circuit, free, theta.detach(), x.detach(), cotangents[0], wants_x)
        by_theta, by_x = phase.gradients()
        return None, None, by_theta.sum(0), by_x if wants_x else None


class BackwardPhase:
    """One backward pass: its gradients come for each row, so that each row is a test of its own."""

    def __init__(self, circuit: NetlistLike, free: Tensor, theta: Tensor, x: Tensor, cotangent: Tensor, wants_x: bool):
        self.circuit, self.free, self.theta, self.x, self.cotangent = circuit, free, theta, x, cotangent
        self.rows = theta.expand(len(x), -1).clone()
        self.theta_steps, self.x_steps = (
            step.expand_as(t) for step, t in zip(circuit.steps(theta, x), (self.rows, x), strict=True)
        )
        self.wants_x = wants_x
        self.solves = 0
        self.law = self._law_at_the_free_state()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of each row by the parameters and by the inputs.

        Returns:
            Of shape `(batch, parameters)` and `(batch, inputs)`.
        """
        if not bool(self.cotangent.any()):
            return torch.zeros_like(self.rows), torch.zeros_like(self.x)
        circuit = self.circuit
        if circuit.gradient == "forward" or (circuit.gradient == "auto" and circuit.reciprocal is False):
            return self._by_forward_derivatives(float("nan"))
        try:
            with warnings.catch_warnings():
                if circuit.gradient == "auto":
                    warnings.simplefilter("error", TruncationWarning)
                by_nudges = self._by_nudges()
        except (TruncationWarning, SolverError):
            if circuit.gradient == "ep":
                raise
            return self._by_forward_derivatives(float("nan"))  # what it answers to is parameters, not nudges
        mismatch = self._mismatch(*by_nudges)
        circuit.reciprocal = mismatch <= MISMATCH
        if circuit.gradient == "auto" and not circuit.reciprocal:
            return self._by_forward_derivatives(mismatch)
        circuit.last = NetlistReport("ep", mismatch, self.solves)
        if not circuit.reciprocal:
            warnings.warn(
                f"the circuit is not reciprocal: along a random change of the parameters, the gradient by nudges is "
                f"{mismatch:.2g} off, relative to the larger of it and the forward derivative. It has one-way "
                "elements, such as a transistor that is driven at its gate. Use gradient='auto' or 'forward': two "
                "solves for each parameter.",
                AsymmetryWarning,
                stacklevel=2,
            )
        return by_nudges

    def _law_at_the_free_state(self) -> Callable[[Tensor, Any, Any], Tensor]:
        """The law, which is linear in what it is differentiated by up to second order, measured once for all rows."""
        with torch.enable_grad():
            theta, x = self.rows.clone().requires_grad_(), self.x.clone().requires_grad_()
            entries = self.circuit.force(self.free, theta, x).sum(0).unbind()  # rows do not act on each other
        slopes: list[Any] = [
            torch.autograd.grad(entry, [theta, x], retain_graph=True, allow_unused=True, materialize_grads=True)
            if entry.requires_grad
            else (torch.zeros_like(theta), torch.zeros_like(x))
            for entry in entries
        ]
        by_theta, by_x = (torch.stack([slope[k] for slope in slopes], 1) for k in range(2))

        def law(z: Tensor, parameters: Any, _: Any) -> Tensor:
            moved, given = parameters
            return torch.einsum("bnp,bp->bn", by_theta, moved) + torch.einsum("bni,bi->bn", by_x, given)

        return law

    def _solve(self, current: Tensor) -> Tensor:
        if not bool(torch.as_tensor(current).any()):
            return self.free
        self.solves += 1
        return self.circuit.operating_points(self.x, self.theta, current)

    def _by_nudges(self) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta, x = self.rows.clone().requires_grad_(), self.x.clone().requires_grad_()
            z = tep.attach_equilibrium(
                self._solve,
                self.law,
                (theta, x),
                stencil=tep.Stencil.symmetric(_NUDGED),
                scale="response",
                noise=_NOISE,
                check=False,
            )
            parts: Any = torch.autograd.grad(z, [theta, x], self.cotangent, allow_unused=True, materialize_grads=True)
        return parts[0], parts[1]

    def _forward_derivatives(self, columns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """By changes of the parameters and inputs of all rows: of shape `(columns, batch)`, of `<g, z>`."""
        found = tep.sensitivities(
            self._solve,
            self.law,
            (self.rows, self.x),
            columns=columns,
            stencil=tep.Stencil.symmetric(_CHANGED),
            scale="absolute",
            noise=_NOISE,
            check=False,
        )
        return torch.einsum("kbn,bn->kb", found.columns, self.cotangent)

    def _mismatch(self, by_theta: Tensor, by_x: Tensor) -> float:
        """Two more solves: what a random change of each row does, and what the gradients by nudges say it does."""
        changes = [
            steps * (2.0 * torch.randint(2, steps.shape, generator=self.circuit.generator) - 1.0)
            for steps in (self.theta_steps, self.x_steps)
        ]
        if not self.wants_x:
            changes[1] = torch.zeros_like(changes[1])
        (true,) = self._forward_derivatives([(changes[0], changes[1])])
        said = (by_theta * changes[0]).sum(1) + (by_x * changes[1]).sum(1)
        seen = _NOISE / _CHANGED * float(self.free.norm()) * float(self.cotangent.norm())
        size = max(float(true.norm()), float(said.norm()), _VISIBLE * seen / MISMATCH)
        return float((true - said).norm()) / size if size else 0.0

    def _by_forward_derivatives(self, mismatch: float) -> tuple[Tensor, Tensor]:
        columns = []
        for k in range(self.rows.shape[1]):
            change = torch.zeros_like(self.rows)
            change[:, k] = self.theta_steps[:, k]
            columns.append((change, torch.zeros_like(self.x)))
        for k in range(self.x.shape[1] if self.wants_x else 0):
            change = torch.zeros_like(self.x)
            change[:, k] = self.x_steps[:, k]
            columns.append((torch.zeros_like(self.rows), change))
        found = self._forward_derivatives(columns).T if columns else self.x.new_zeros(len(self.x), 0)
        split = self.rows.shape[1]
        by_theta = found[:, :split] / self.theta_steps
        by_x = found[:, split:] / self.x_steps if self.wants_x else torch.zeros_like(self.x)
        self.circuit.last = NetlistReport("forward", mismatch, self.solves)
        return by_theta, by_x
