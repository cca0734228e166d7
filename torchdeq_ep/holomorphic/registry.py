"""What the holomorphic mode does with each operation: one table, from function objects to policies.

An operation has several spellings (`torch.exp`, `Tensor.exp`, `Tensor.exp_`, `torch.special.expit`); a policy is given
to its name and holds for all of them. Whatever is not in the table is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from torchdeq_ep.errors import InvalidOptionError

Operation = Callable[..., Any]
F = TypeVar("F", bound=Operation)


class Kind(Enum):
    """What happens to an operation with a complex argument."""

    NATIVE = "torch's own complex kernel"
    RULE = "rule"
    EXPANDED = "expanded into operations with rules"
    GATED = "piecewise"
    REFUSED = "refused"


class Form(Enum):
    """How a spelling of an operation takes its arguments."""

    PLAIN = "f(x, y)"
    REFLECTED = "f(y, x)"
    INPLACE = "x = f(x, y)"


@dataclass(frozen=True)
class Policy:
    """What the mode does with one operation.

    Args:
        name: The name without namespace and decoration, e.g. `softmax`.
        kind: See [`Kind`][torchdeq_ep.holomorphic.registry.Kind].
        group: Heading in the table of the documentation.
        note: The formula of a rule, or the reason of a refusal.
        apply: The rule; `None` for native and refused operations. That of a gated operation takes a kink counter first.
        is_inplace: Whether this spelling writes into its first argument.
    """

    name: str
    kind: Kind
    group: str
    note: str = ""
    apply: Operation | None = None
    is_inplace: bool = False


class CannotContinueError(Exception):
    """Raised by a rule that does not cover these arguments; the mode turns it into a located refusal."""


_POLICIES: dict[Operation, Policy] = {}
_BY_NAME: dict[str, Policy] = {}
_SPACES = (torch, Tensor, functional, torch._C._nn, torch.special, torch._C._VariableFunctions)


def find_policy(operation: Operation) -> Policy | None:
    """The policy of a function object as PyTorch hands it to a mode, or `None`."""
    policy = _POLICIES.get(operation)
    if policy is None and isinstance(operation, torch._ops.OpOverload):
        policy = _POLICIES.get(operation.overloadpacket)
    if policy is None and isinstance(operation, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        namespace, _, name = str(operation).partition(".")
        policy = _BY_NAME.get(name.partition(".")[0]) if namespace == "aten" else None
    return policy


def declare(names: str, kind: Kind, group: str, note: str = "", apply: Operation | None = None) -> None:
    """Gives a policy to all spellings of some names.

    Args:
        names: Names, separated by blanks; with a namespace (`fft.fft`) if they are found in that one only.
        kind: What happens to them.
        group: Heading in the table.
        note: Formula or reason.
        apply: The rule.
    """
    for path in names.split():
        name = path.removeprefix("nn.functional.").removeprefix("_VF.")
        for spelling, form in _spellings(path):
            this = _swapped(apply) if form is Form.REFLECTED and apply is not None else apply
            _POLICIES[spelling] = Policy(name, kind, group, note, this, form is Form.INPLACE)
        if path == name:
            _BY_NAME[name] = Policy(name, kind, group, note, apply)
            _BY_NAME[f"{name}_"] = Policy(name, kind, group, note, apply, is_inplace=True)


def rule(names: str, group: str, note: str) -> Callable[[F], F]:
    """Decorator: the function is the rule of these names."""

    def register(apply: F) -> F:
        declare(names, Kind.RULE, group, note, apply)
        return apply

    return register


def gated(names: str, group: str, note: str) -> Callable[[F], F]:
    """Decorator: the function is the rule of these piecewise analytic operations, and is given a kink counter first."""

    def register(apply: F) -> F:
        declare(names, Kind.GATED, group, note, apply)
        return apply

    return register


def expanded(name: str, group: str, note: str) -> None:
    """A Python function of PyTorch that is made of operations with rules: it runs as it is, inside the mode.

    The line at its head that would hand it to the mode once more is switched off, in a copy.

    Args:
        name: Its name in `torch.nn.functional`.
        group: Heading in the table.
        note: What it is made of.
    """
    function: Any = getattr(functional, name)
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    namespace = {**function.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    body = FunctionType(function.__code__, namespace, name, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    declare(name, Kind.EXPANDED, group, note, body)


def continued(group: str, note: str) -> Callable[[F], F]:
    """Decorator: a function of this package that hands itself to modes, and is right at complex arguments as it is."""

    def register(function: F) -> F:
        _POLICIES[function] = Policy(getattr(function, "__name__", ""), Kind.RULE, group, note, function)
        return function

    return register


def _swapped(apply: Operation) -> Operation:
    return lambda first, second: apply(second, first)


def _spellings(name: str) -> Iterator[tuple[Operation, Form]]:
    path, _, base = name.rpartition(".")
    spaces = (attrgetter(path)(torch),) if path else _SPACES
    variants = {
        base: Form.INPLACE if base in _ALWAYS_INPLACE else Form.PLAIN,
        f"__{base}__": Form.PLAIN,
        f"__r{base}__": Form.REFLECTED,
        f"{base}_": Form.INPLACE,
        f"__i{base}__": Form.INPLACE,
    }
    for space in spaces:
        for variant, form in variants.items():
            found: Any = getattr(space, variant, None)
            if hasattr(found, "__get__") and not callable(found):
                yield found.__get__, Form.PLAIN
                yield found.__set__, Form.INPLACE
            elif callable(found) and not isinstance(found, type):
                yield found, form


_ALWAYS_INPLACE = frozenset({"__setitem__", "copy_", "fill_", "zero_"})


def register_rule(op: Operation, rule: Operation, *, overwrite: bool = False) -> None:
    """Teaches the holomorphic mode an operation of your own.

    Inside the mode, a call of `op` with a complex argument becomes a call of `rule` with the same arguments. The rule
    must be the analytic continuation of `op`: equal to it at real arguments, and complex differentiable;
    [`check`][torchdeq_ep.holomorphic.check] tests that. The mode is off while the rule runs; enter it again, with
    `torchdeq_ep.holomorphic.mode()`, to use other rules in it.

    An operation made of analytic PyTorch operations, be it a Python function or a `torch.autograd.Function`, needs no
    rule. An extension that calls C++ or CUDA code directly is seen by the mode only if it is wrapped in one of the
    forms below.

    Args:
        op: A function of PyTorch, an operator of `torch.library` (`torch.ops.my.op`), a subclass of
            `torch.autograd.Function` (its `apply` is replaced by one that modes can see), or any function that calls
            `torch.overrides.handle_torch_function`.
        rule: Function of the same arguments as `op`, or as the `apply` of the `Function`.
        overwrite: Replace a rule, or lift a refusal, that exists already.

    Raises:
        InvalidOptionError: If `op` has a rule or is refused, and `overwrite` is false; or if one of the two is not
            callable.

    Example:
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return torch.from_numpy(x.numpy() ** 3)  # leaves PyTorch: refused at complex states
        >>> register_rule(Cube, lambda x: x * x * x)
        >>> from torchdeq_ep import holomorphic
        >>> with holomorphic.mode():
        ...     Cube.apply(torch.tensor([1 + 1j]))
        tensor([-2.+2.j])
    """
    for name, value in (("op", op), ("rule", rule)):
        if not callable(value):
            raise InvalidOptionError(f"{name} must be callable, not {value!r}.")
    key = _dispatched(op) if isinstance(op, type) and issubclass(op, torch.autograd.Function) else op
    known = find_policy(key)
    if known is not None and not overwrite:
        raise InvalidOptionError(
            f"{known.name} has a policy in the holomorphic mode already ({known.kind.value}); pass overwrite=True to "
            "replace it."
        )
    title = getattr(op, "__qualname__", None) or str(op)
    _POLICIES[key] = Policy(title, Kind.RULE, "registered", "given to register_rule", rule)


def _dispatched(function: Any) -> Operation:
    """The `apply` of an autograd Function, in a form that asks the active modes first."""
    current = function.__dict__.get("apply")
    if isinstance(current, staticmethod) and current.__func__ in _POLICIES:
        return current.__func__
    apply = function.apply

    @functools.wraps(apply)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(dispatched, args, *args, **kwargs)
        return apply(*args, **kwargs)

    function.apply = staticmethod(dispatched)
    return dispatched


def rules_table() -> str:
    """What the holomorphic mode does with which operation, as Markdown; made from the registry itself.

    Returns:
        One section per kind of policy. The page `holomorphic-rules.md` of the documentation is this text.

    Example:
        >>> print(rules_table().splitlines()[0])
        # Operations at complex states
    """
    policies = sorted({(p.group, p.name, p.kind, p.note) for p in _POLICIES.values()}, key=lambda p: (p[0], p[1]))
    lines = [
        "# Operations at complex states",
        "",
        "Generated by `python -m torchdeq_ep.holomorphic`. Every spelling of a name is covered: `torch.x`, `Tensor.x`,",
        "`torch.nn.functional.x`, operators, in-place forms, and `torch.ops.aten.x`. What is not listed is refused.",
    ]
    for kind, title in _SECTIONS.items():
        rows: dict[tuple[str, str], list[str]] = {}
        for group, name, this_kind, note in policies:
            if this_kind is kind:
                rows.setdefault((group, note), []).append(f"`{name}`")
        lines += ["", f"## {title}", "", "| group | operations | how |", "|---|---|---|"]
        lines += [f"| {group} | {', '.join(names)} | {note} |" for (group, note), names in rows.items()]
    return "\n".join(lines) + "\n"


_SECTIONS = {
    Kind.RULE: "Rules: the analytic continuation",
    Kind.EXPANDED: "Composites: expanded into the operations above and below",
    Kind.NATIVE: "PyTorch's own complex kernels, and operations on shape and storage",
    Kind.GATED: 'Piecewise analytic: refused, unless allowed by `mode(piecewise="real-part")`',
    Kind.REFUSED: "Refused",
}
