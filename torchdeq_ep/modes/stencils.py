"""Stencils: the amplitudes at which an equilibrium is nudged, and how the answers are combined.

A nudge of amplitude `b` moves the free state by `b d_b`, where `d_b` is analytic in `b` near 0 if the map is, and
`d_0 = (I - J)^-1 g` is the error vector wanted. A stencil is nodes `b_k` and coefficients `c_k` with

    sum_k c_k = 1,    Re sum_k c_k d_{b_k} = d_0 + O(beta^order),

eq. (8) of the theory page.

One-sided: Scellier & Bengio 2017. Symmetric: Laborieux et al. 2021 (Front. Neurosci. 15:633674). Contour: Laborieux
& Zenke 2022 (arXiv 2209.00530, eq. 7, the Cauchy integral by the trapezoidal rule). Richardson: the classical
extrapolation of the symmetric stencil in powers of `beta^2`.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from typing import Literal, get_args

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.errors import InvalidOptionError

Beta = float | Literal["auto"]
NudgeDirection = Literal["down", "up"]
"""Whether a one-sided nudge leads to a lower loss or to a higher one."""
Node = float | complex
LARGEST_AUTO_BETA = 0.1
"""Above a tenth of the state's norm a nudge may leave the disc on which `d_b` is analytic, whatever the order."""


@dataclass(frozen=True)
class Stencil:
    """Nodes and coefficients of a nudging scheme, [eq. (8)][eq-8] of the theory page.

    Use one of the four constructors: [`one_sided`][torchdeq_ep.Stencil.one_sided],
    [`symmetric`][torchdeq_ep.Stencil.symmetric], [`richardson`][torchdeq_ep.Stencil.richardson] or
    [`contour`][torchdeq_ep.Stencil.contour].

    Args:
        name: What messages and reports call the stencil.
        beta: Amplitude: a positive number, or `"auto"` (see [`resolve`][torchdeq_ep.Stencil.resolve]).
        unit_nodes: The nodes at amplitude 1.
        coefficients: One real number per node; they sum to 1.
        order: The error is `O(beta ** order)`.

    Raises:
        InvalidOptionError: If `beta` is neither positive and finite nor `"auto"`.

    Example:
        >>> stencil = Stencil.symmetric(0.1)
        >>> stencil.nodes, stencil.coefficients, stencil.order
        ((0.1, -0.1), (0.5, 0.5), 2)
    """

    name: str
    beta: Beta
    unit_nodes: tuple[Node, ...]
    coefficients: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        if self.beta != "auto":
            valid = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
            if not valid or not 0 < self.beta < math.inf:
                raise InvalidOptionError(
                    f"beta must be a positive finite number or 'auto', not {self.beta!r}: how large the nudge is. "
                    "Try 'auto', or 0.01. A one-sided nudge is turned round by direction='up', not by its sign."
                )
            object.__setattr__(self, "beta", float(self.beta))

    @classmethod
    def one_sided(cls, beta: Beta = "auto", direction: NudgeDirection = "down") -> Stencil:
        """Classic EP: one nudge, towards a lower loss unless told otherwise, error `O(beta)`.

        The direction matters for large nudges by the loss itself ([`nudge_loss`][torchdeq_ep.nudge_loss]): the force
        fades as the loss is reached downhill, and grows uphill.

        Args:
            beta: Amplitude, a positive number or `"auto"`.
            direction: `"down"`, to a lower loss, as in Scellier & Bengio 2017; `"up"`, to a higher one, as in the
                public code of Laborieux & Zenke (arXiv 2309.02214).

        Returns:
            The stencil with the single node `-beta`, or `beta` for `"up"`: a positive node adds the gradient of the
            loss to the map.

        Raises:
            InvalidOptionError: If `beta` or `direction` is not acceptable.

        Example:
            >>> Stencil.one_sided(0.5).nodes, Stencil.one_sided(0.5, direction="up").nodes
            ((-0.5,), (0.5,))
        """
        check_choice("direction", direction, get_args(NudgeDirection))
        name, node = ("one-sided", -1.0) if direction == "down" else ("one-sided-up", 1.0)
        return cls(name, beta, (node,), (1.0,), 1)

    @classmethod
    def symmetric(cls, beta: Beta = "auto") -> Stencil:
        """Two opposite nudges, error `O(beta^2)`; the default.

        Args:
            beta: Amplitude, a positive number or `"auto"`.

        Returns:
            The stencil with nodes `beta` and `-beta`.

        Raises:
            InvalidOptionError: If `beta` is not acceptable.

        Example:
            >>> Stencil.symmetric(0.5).nodes
            (0.5, -0.5)
        """
        return cls("symmetric", beta, (1.0, -1.0), (0.5, 0.5), 2)

    @classmethod
    def richardson(cls, beta: Beta = "auto", order: int = 4) -> Stencil:
        """Symmetric pairs at `beta, beta/2, beta/4, ...`, extrapolated; error `O(beta^order)`, real nodes only.

        Args:
            beta: Largest amplitude, a positive number or `"auto"`.
            order: 2, 4, 6 or 8; `order / 2` pairs are solved.

        Returns:
            The stencil with `order` nodes.

        Raises:
            InvalidOptionError: If `order` or `beta` is not acceptable.

        Example:
            >>> Stencil.richardson(0.4, order=4).nodes
            (0.4, -0.4, 0.2, -0.2)
        """
        if order not in (2, 4, 6, 8):
            raise InvalidOptionError(f"order of a Richardson stencil must be 2, 4, 6 or 8, not {order!r}.")
        steps = [0.5**pair for pair in range(order // 2)]
        nodes: list[Node] = []
        coefficients: list[float] = []
        for step in steps:
            # Lagrange weights at 0 for interpolation in the variable step^2.
            weight = math.prod(other**2 / (other**2 - step**2) for other in steps if other != step)
            nodes += [step, -step]
            coefficients += [weight / 2, weight / 2]
        return cls(f"richardson-{order}", beta, tuple(nodes), tuple(coefficients), order)

    @classmethod
    def contour(cls, beta: Beta = "auto", n_points: int = 4) -> Stencil:
        """Nodes on a circle in the complex plane, error `O(beta^n_points)`; the map must be holomorphic.

        The mean of `d_b` over the circle is Cauchy's integral for `d_0` (arXiv 2209.00530, eq. 7), and
        [eq. (17)][eq-17] of the theory page says what of the series of `d_b` is left.

        Args:
            beta: Radius, a positive number or `"auto"`.
            n_points: Number of nodes, at least 2; by conjugate symmetry only `n_points // 2 + 1` are solved.

        Returns:
            The stencil with nodes `beta * exp(2 pi i k / n_points)`; nodes on the real axis are of type `float`.

        Raises:
            InvalidOptionError: If `n_points` or `beta` is not acceptable.

        Example:
            >>> Stencil.contour(0.5, n_points=2).nodes
            (0.5, -0.5)
        """
        check_count("n_points of a contour", n_points, 2)
        nodes: list[Node] = []
        for k in range(n_points):
            if k == 0:
                nodes.append(1.0)
            elif 2 * k == n_points:
                nodes.append(-1.0)
            else:
                nodes.append(cmath.exp(2j * math.pi * k / n_points))
        return cls(f"contour-{n_points}", beta, tuple(nodes), (1.0 / n_points,) * n_points, n_points)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The amplitudes `b_k`, real ones as `float`.

        Raises:
            InvalidOptionError: If `beta` is `"auto"`: call [`resolve`][torchdeq_ep.Stencil.resolve] first.
        """
        beta = self._numeric_beta()
        return tuple(beta * node for node in self.unit_nodes)

    @property
    def is_real(self) -> bool:
        """Whether every node is real, so that any map can be nudged."""
        return not any(isinstance(node, complex) for node in self.unit_nodes)

    @property
    def noise_gain(self) -> float:
        """`sum |c_k| / |u_k|`: a relative error `eps` of one call of `f` becomes `noise_gain * eps / beta`."""
        return sum(
            abs(coefficient) / abs(node) for node, coefficient in zip(self.unit_nodes, self.coefficients, strict=True)
        )

    @property
    def mean_noise_gain(self) -> float:
        """The same for errors of the nodes that have nothing to do with each other: `sqrt(sum (c_k / |u_k|)^2)`."""
        return math.sqrt(sum((c / abs(node)) ** 2 for node, c in zip(self.unit_nodes, self.coefficients, strict=True)))

    def resolve(self, eps: float) -> Stencil:
        """The same stencil with `beta="auto"` replaced by a number.

        Truncation grows as `beta^order`, rounding as `noise_gain * eps / beta`. The two are equal at
        `(noise_gain * eps) ** (1 / (order + 1))` ([eq. (18)][eq-18] of the theory page), which is taken, but never more
        than 0.1. The tolerance of a nudged solve is relative to the cotangent, so it adds an error of its own that does
        not depend on `beta`, and does not move the balance.

        Args:
            eps: Relative rounding error of one call of `f`: `torch.finfo(dtype).eps`.

        Returns:
            A stencil whose `beta` is a number; `self` if it already is.

        Example:
            >>> round(Stencil.symmetric("auto").resolve(eps=1e-12).beta, 7)
            0.0001
        """
        if self.beta != "auto":
            return self
        return self.at(min(LARGEST_AUTO_BETA, (self.noise_gain * eps) ** (1 / (self.order + 1))))

    def at(self, beta: float) -> Stencil:
        """The same stencil at another amplitude.

        Args:
            beta: Positive number.

        Returns:
            A new stencil.

        Raises:
            InvalidOptionError: If `beta` is not acceptable.

        Example:
            >>> Stencil.symmetric(0.4).at(0.2).nodes
            (0.2, -0.2)
        """
        return Stencil(self.name, beta, self.unit_nodes, self.coefficients, self.order)

    def expected_error(self, eps: float) -> float:
        """Truncation plus rounding, relative to the error vector, for a map with derivatives of order one.

        Args:
            eps: Relative rounding error of one call of `f`.

        Returns:
            `beta^order + noise_gain * eps / beta`.

        Raises:
            InvalidOptionError: If `beta` is `"auto"`.

        Example:
            >>> Stencil.symmetric(0.1).expected_error(eps=0.0) == 0.1**2
            True
        """
        beta = self._numeric_beta()
        return beta**self.order + self.noise_gain * eps / beta

    def upper_half(self) -> tuple[tuple[Node, ...], tuple[float, ...]]:
        """The nodes that need solving, and their coefficients in `Re sum_k c_k d_k`.

        For a real map `d_{conj b} = conj d_b`, so a node below the real axis adds what its mirror image adds.

        Returns:
            Nodes with non-negative imaginary part, and coefficients with those of the mirror images added.

        Raises:
            InvalidOptionError: If `beta` is `"auto"`.

        Example:
            >>> nodes, coefficients = Stencil.contour(0.1, n_points=4).upper_half()
            >>> len(nodes), coefficients
            (3, (0.25, 0.5, 0.25))
        """
        kept = [
            (node, coefficient * (2 if isinstance(node, complex) else 1))
            for node, coefficient in zip(self.nodes, self.coefficients, strict=True)
            if not isinstance(node, complex) or node.imag > 0
        ]
        return tuple(node for node, _ in kept), tuple(coefficient for _, coefficient in kept)

    def _numeric_beta(self) -> float:
        if isinstance(self.beta, str):
            raise InvalidOptionError(
                "beta='auto' has no nodes yet: the amplitude depends on the dtype of the state. "
                "Call stencil.resolve(torch.finfo(dtype).eps) first."
            )
        return self.beta
