"""The registry of backward modes: names, spec strings, and modes that other distributions bring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torchdeq_ep.errors import InvalidOptionError, PluginError, UnknownBackwardError, unknown_name
from torchdeq_ep.modes.base import Mode, OnDivergence
from torchdeq_ep.modes.linear import ImplicitDifferentiation, InfinitesimalEP
from torchdeq_ep.modes.propagation import EquilibriumPropagation
from torchdeq_ep.modes.reversible import Reversible
from torchdeq_ep.modes.schedules import Online
from torchdeq_ep.modes.series import Neumann, OneStep
from torchdeq_ep.modes.shine import Shine
from torchdeq_ep.modes.stencils import Beta, NudgeDirection, Stencil
from torchdeq_ep.modes.steps import Phantom, Unrolled
from torchdeq_ep.plugins import BACKWARDS, by_name, entries, load
from torchdeq_ep.relaxation import GMRES

ModeLike = Callable[[Callable[..., Any], Any, Any], Any]
"""What a mode is: `(f, z_star, cotangent) -> error vector`."""


def one_sided(*, beta: Beta = "auto", direction: NudgeDirection = "down", **options: Any) -> Mode:
    """`ep-one-sided`: One real nudge, downhill or uphill, error `O(beta)`. Further options: `beta`, `direction`."""
    return EquilibriumPropagation(Stencil.one_sided(beta, direction), **options)


def symmetric(*, beta: Beta = "auto", **options: Any) -> Mode:
    """`ep`: Two opposite real nudges, error `O(beta^2)`. Further option: `beta`."""
    return EquilibriumPropagation(Stencil.symmetric(beta), **options)


def richardson(*, beta: Beta = "auto", order: int = 4, **options: Any) -> Mode:
    """`ep-richardson`: Real nudges extrapolated to `O(beta^order)`. Further options: `beta`, `order`."""
    return EquilibriumPropagation(Stencil.richardson(beta, order), **options)


def holomorphic(*, beta: Beta = "auto", n_points: int = 4, **options: Any) -> Mode:
    """`hep`: Complex nudges on a circle, error `O(beta^n_points)`. Further options: `beta`, `n_points`."""
    return EquilibriumPropagation(Stencil.contour(beta, n_points), **options)


def holomorphic_online(
    *, beta: Beta = "auto", n_points: int = 4, steps: int | None = None, periods: int | None = None, **options: Any
) -> Mode:
    """`hep-online`: As `hep`, the nodes visited in turn. Further options: `steps` at each, `periods`."""
    numbers = {name: number for name, number in (("steps", steps), ("periods", periods)) if number is not None}
    if numbers and "schedule" in options:
        raise InvalidOptionError(
            f"schedule={options['schedule']!r} is given beside {', '.join(numbers)}, which are numbers of a schedule: "
            "leave out one of the two."
        )
    schedule = Online(**numbers) if numbers else "online"
    return holomorphic(beta=beta, n_points=n_points, **{"schedule": schedule, **options})


def asymmetric(*, beta: Beta = "auto", **options: Any) -> Mode:
    """`aep`: Symmetric nudges with the asymmetric correction; exact for every Jacobian."""
    return symmetric(beta=beta, **{"correction": "asymmetric", **options})


def one_step() -> Mode:
    """`one-step`: The cotangent itself, as if the last argument of the map were a constant: no products."""
    return OneStep()


def jacobian_free() -> Mode:
    """`jfb`: Another name of `one-step`."""
    return OneStep()


def neumann(*, k: int = 5, tau: float = 1.0) -> Mode:
    """`neumann`: `k` terms of the Neumann series of `ift`, damped by `tau`. Options: `k`, `tau`."""
    return Neumann(k, tau)


def phantom(*, k: int = 5, tau: float = 0.5) -> Mode:
    """`phantom`: Backpropagation through `k` damped steps from `z*`, as torchdeq defines it. Options: `k`, `tau`."""
    return Phantom(k, tau)


def unrolled(*, k: int | None = None) -> Mode:
    """`unrolled`: Backpropagation through the last `k` steps made, or all of them (BPTT). Option: `k`."""
    return Unrolled(k)


def gmres(*, max_iter: int | None = None, tol: float | None = None, on_divergence: OnDivergence = "shrink") -> Mode:
    """`gmres`: As `ift`, solved by GMRES, with a Krylov space for each sample. Options: `max_iter`, `tol`."""
    return ImplicitDifferentiation(solver=GMRES, max_iter=max_iter, tol=tol, on_divergence=on_divergence)


def shine(*, refine: int = 0, fallback: float | None = None) -> Mode:
    """`shine`: The inverse that the forward solver `broyden-inverse` estimated. Options: `refine`, `fallback`."""
    return Shine(refine, fallback)


def reversible() -> Mode:
    """`reversible`: The steps of the solver `reversible`, run backwards: exact, with memory for two states."""
    return Reversible()


_factories: dict[str, Callable[..., ModeLike]] = {
    "ift": ImplicitDifferentiation,
    "ep-one-sided": one_sided,
    "ep": symmetric,
    "ep-richardson": richardson,
    "hep": holomorphic,
    "hep-online": holomorphic_online,
    "ep-infinitesimal": InfinitesimalEP,
    "aep": asymmetric,
    "one-step": one_step,
    "jfb": jacobian_free,
    "neumann": neumann,
    "phantom": phantom,
    "unrolled": unrolled,
    "gmres": gmres,
    "shine": shine,
    "reversible": reversible,
}
BUILT_IN = tuple(_factories)
"""Names that no plugin can have."""


def register_backward(name: str, factory: Callable[..., ModeLike], *, overwrite: bool = False) -> None:
    """Give a backward mode a name, by which specs, configurations and the command line find it.

    Other distributions register theirs without being imported, through the entry-point group
    `torchdeq_ep.backwards`: name and factory.

    Args:
        name: The name; no colon, comma or equals sign.
        factory: Called with the options of a spec; returns a mode, i.e. a callable `(f, z_star, cotangent) -> v`. It
            should be picklable if models that use it are to be.
        overwrite: Replace a mode of the same name.

    Raises:
        InvalidOptionError: If the name is taken or unusable, or the factory cannot be called.

    Example:
        >>> def half_step():
        ...     return lambda f, z_star, cotangent: 0.5 * cotangent
        >>> register_backward("half-step", half_step)
        >>> "half-step" in available_backwards()
        True
        >>> del _factories["half-step"]  # this example leaves nothing behind
    """
    if not isinstance(name, str) or not name or set(name) & set(":,="):
        raise InvalidOptionError(f"a backward mode cannot be named {name!r}: no colon, comma or equals sign, please.")
    if not callable(factory):
        raise InvalidOptionError(f"the factory of backward mode {name!r} must be callable, not {factory!r}.")
    if name in available_backwards() and not overwrite:
        raise InvalidOptionError(f"there is a backward mode {name!r} already: pass overwrite=True to replace it.")
    _factories[name] = factory


def available_backwards() -> tuple[str, ...]:
    """The names of all backward modes, in the order they were registered.

    Returns:
        Names of built-in and registered modes, then those found through entry points.

    Example:
        >>> available_backwards()[:3]
        ('ift', 'ep-one-sided', 'ep')
    """
    return tuple(dict.fromkeys((*_factories, *(entry.name for entry in entries(BACKWARDS)))))


def get_backward(spec: str | ModeLike, **overrides: Any) -> ModeLike:
    """The backward mode that a spec describes.

    Args:
        spec: A name, a name with options (`"hep:n_points=6,beta=0.1"`), or a mode. `beta` given for a mode that is an
            [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation] moves its stencil to that amplitude.
        **overrides: Options that take precedence over those of the spec.

    Returns:
        A mode, `(f, z_star, cotangent) -> error vector`.

    Raises:
        UnknownBackwardError: If there is no mode of that name.
        InvalidOptionError: If the mode has no such option, or does not accept its value.

    Example:
        >>> get_backward("ep:beta=0.1").stencil.nodes
        (0.1, -0.1)
    """
    if not isinstance(spec, str):
        return _adjust(spec, overrides)
    name, _, text = spec.partition(":")
    name = name.strip()
    options = {**_parse_options(spec, text), **overrides}
    factory = _factories.get(name) or _load(name)
    known = _options_of(factory)
    for option in options:
        if known is not None and option not in known:
            raise InvalidOptionError(f"backward mode {name!r}: {unknown_name('option', option, known)}")
    return factory(**options)


def describe_backward(name: str) -> str:
    """The first line of documentation of a registered mode's factory.

    Args:
        name: A name from [`available_backwards`][torchdeq_ep.available_backwards].

    Returns:
        One line of text, without the name.

    Raises:
        UnknownBackwardError: If there is no mode of that name.

    Example:
        >>> describe_backward("aep")
        'Symmetric nudges with the asymmetric correction; exact for every Jacobian.'
    """
    text = (inspect.getdoc(_factories.get(name) or _load(name)) or "").partition("\n")[0]
    return text.removeprefix(f"`{name}`: ")


def _adjust(mode: ModeLike, overrides: dict[str, Any]) -> ModeLike:
    if not callable(mode):
        raise UnknownBackwardError(
            f"a backward is a name, a spec or a callable (f, z_star, cotangent) -> error vector, not {mode!r}."
        )
    if not overrides:
        return mode
    if not isinstance(mode, Mode):
        raise InvalidOptionError(
            f"options {sorted(overrides)} cannot be given to {mode!r}: build it with them instead."
        )
    if "beta" in overrides and isinstance(mode, EquilibriumPropagation) and isinstance(mode.stencil, Stencil):
        overrides = {**overrides, "stencil": replace(mode.stencil, beta=overrides["beta"])}
        del overrides["beta"]
    known = mode.__dataclass_fields__
    for option in overrides:
        if option not in known:
            raise InvalidOptionError(f"{type(mode).__name__}: {unknown_name('option', option, known)}")
    return replace(mode, **overrides)


def _parse_options(spec: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise InvalidOptionError(
                f"cannot read {part!r} in the spec {spec!r}: options are written name:key=value,key=value."
            )
        if key in options:
            raise InvalidOptionError(f"option {key!r} is given twice in the spec {spec!r}.")
        options[key] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[lowered]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _options_of(factory: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the options a factory takes; those of EquilibriumPropagation in place of our `**options`."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        if factory.__module__ != __name__:
            return None
        names += [name for name in EquilibriumPropagation.__dataclass_fields__ if name != "stencil"]
    return tuple(names)


def _load(name: str) -> Callable[..., ModeLike]:
    entry = by_name(entries(BACKWARDS))[0].get(name)  # `torchdeq-ep list` tells of others of that name
    if entry is None:
        raise UnknownBackwardError(unknown_name("backward mode", name, available_backwards()))
    try:
        factory: Callable[..., ModeLike] = load(entry)
    except PluginError as error:
        raise UnknownBackwardError(*error.args) from error
    _factories[name] = factory
    return factory
