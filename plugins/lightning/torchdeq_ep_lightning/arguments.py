"""Options of `torchdeq-ep train` as a user writes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_count

if TYPE_CHECKING:
    from torchdeq_ep_lightning.flavour import LightningArgumentParser

# Options that stand for all below them.
_SECTIONS = ("--model", "--data", "--swap", "--homeostasis", "--alignment", "--trainer")
_ALIASES = {"--seed": "--seed_everything"}
_HOMEOSTASIS, _ENABLED = "--homeostasis.", "--homeostasis.enabled"
_LARGEST_SEED = 2**32 - 1


def as_written(arguments: Sequence[str]) -> list[str]:
    """Arguments by the names that the parser has; who says how homeostasis is to be wants it, unless told otherwise.

    Args:
        arguments: As on the command line.

    Returns:
        The same, with what goes without saying.

    Example:
        >>> as_written(["--seed", "1", "--homeostasis.weight", "5"])
        ['--seed_everything', '1', '--homeostasis.weight', '5', '--homeostasis.enabled', 'true']
    """
    found = [_ALIASES.get(argument, argument) for argument in arguments]
    own = [argument for argument in found if argument.startswith(_HOMEOSTASIS)]
    is_told = any(argument.startswith(_ENABLED) for argument in own)
    return [*found, _ENABLED, "true"] if own and not is_told else found


def check_numbers(config: Any) -> None:
    """Refuse numbers with which nothing would be trained, or not twice alike.

    Args:
        config: The configuration.

    Raises:
        InvalidOptionError: If one is.
    """
    check_count("checkpoint_every", config.checkpoint_every)
    seed = config.seed_everything
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise InvalidOptionError(
            f"seed must be a whole number from 0 to {_LARGEST_SEED}, by which a run is repeated, not {seed!r}."
        )
    for key in ("max_epochs", "max_steps"):
        if config.trainer[key] == 0:
            raise InvalidOptionError(f"trainer.{key} of 0 trains nothing: give a number of at least 1.")


def refuse_unknown_options(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an option that does not exist, and name the nearest that does.

    Args:
        arguments: As on the command line.
        known: The options that exist. What lies below one of them, as `--trainer.logger.class_path`, is not looked at.

    Raises:
        InvalidOptionError: If there is one.

    Example:
        >>> refuse_unknown_options(["--model.lr", "0.1"], ["--model", "--model.lr"])
    """
    for argument in arguments:
        name = argument.partition("=")[0].removesuffix("+")
        below = any(name.startswith(f"{option}.") for option in known if option not in _SECTIONS)
        if name.startswith("--") and len(name) > 2 and name not in known and not below:
            # In another section the last part may be the same: --lr is --model.lr.
            near = [option for option in known if option.rpartition(".")[2] == name.removeprefix("--")]
            near = near or difflib.get_close_matches(name, known, n=1)
            also = f" Did you mean {near[0]!r}?" if near else ""
            raise InvalidOptionError(
                f"unknown option {name!r}.{also} `torchdeq-ep train RECIPE --print_config` writes all there are."
            )


def first_words(message: str, parser: LightningArgumentParser) -> str:
    """An error of the parser's, with the nearest key where one of a recipe does not exist."""
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    name = ".".join(unknown.groups()) if unknown else ""
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1) if name else []
    return f"{message.rstrip('.')}.{f' Did you mean {near[0]!r}?' if near else ''}"
