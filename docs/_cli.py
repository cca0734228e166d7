"""`docs/cli.md` from the parsers of the command line: `python docs/_cli.py` writes it."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchdeq_ep import cli
from torchdeq_ep_lightning import sweep, training
from torchdeq_ep_physics import command as physics

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """# Command line

This page is made from the parsers of the commands by `docs/_cli.py`. `torchdeq-ep COMMAND --help` shows the same in the
terminal, and `torchdeq-ep --version` the version.

The exit code is 0, or 2 if something that was asked for does not exist or cannot be done; the reason is on standard
error, with the nearest name that exists. `sweep` ends with 1 if a run has failed. After Ctrl-C it is 130; `train` and
`sweep` go on by the same command.

| commands | come with |
| --- | --- |
| `list`, `env`, `errors` | `torchdeq-ep` |
| `demo`, `compare`, `diagnose` | `torchdeq-ep[compare]` |
| `physics` | `torchdeq-ep-physics[recipes]` |
| `train`, `sweep` | `torchdeq-ep-lightning` |

Another distribution adds a command by an entry point of the group `torchdeq_ep.commands`: its name, and a callable from
the remaining arguments to an exit code, which may also end by `sys.exit`. A plugin that cannot be imported breaks no
other command, and if two have one name, that of the distribution that comes first is used, and it is said.
"""

GUIDES = {
    "compare": "[Compare backward passes](compare.md)",
    "diagnose": "[Find out why a gradient is off](diagnose.md)",
    "demo": "[the first page](index.md)",
    "env": "[Versions and support](support.md#where-to-ask-and-what-to-send)",
    "errors": "[Errors and warnings](errors.md)",
    "physics": "[Physical networks](physics.md)",
    "train": "[Train the papers' networks](train.md)",
    "sweep": "[Sweeps](sweeps.md)",
}

EXAMPLES = {
    "list": "torchdeq-ep list",
    "compare": "torchdeq-ep compare my_package.models:factory --backward ep --backward hep:n_points=6 --plot out.png",
    "diagnose": "torchdeq-ep diagnose my_package.models:factory --markdown diagnosis.md",
    "demo": "torchdeq-ep demo --plot demo.png",
    "env": "torchdeq-ep env",
    "errors": "torchdeq-ep errors NotHolomorphicError",
    "physics": "torchdeq-ep physics iris --simulator twin --steps 20",
    "train": "torchdeq-ep train digits-mlp --backward hep:n_points=4 --seed 1 --model.angle 30 --trainer.max_epochs 5",
    "sweep": "torchdeq-ep sweep digits-mlp --backward ift ep --angle 0 90 --seed 0 1 --jobs 2",
}

TRAIN = """Train a network of the papers. The same command again resumes a run that was stopped.

Options are the keys of the recipe. Values are written as in YAML. The defaults below are those of the classes; a recipe
replaces many of them, and `--print_config` writes what holds in the end. Options of `--trainer.*` are those of
its `Trainer`, explained by [Lightning](https://lightning.ai).
"""

GROUPS = {
    "data": ("The images", training.ImageData),
    "model": ("The network", training.VectorFieldClassifier),
}


def page() -> str:
    """The Markdown of the page."""
    commands = dict(choices(cli._parser({})))
    commands |= {"physics": physics.parser(), "sweep": sweep._parser()}
    parts = [INTRODUCTION]
    for name in EXAMPLES:
        parts += train() if name == "train" else command(name, commands[name])
    return "\n".join(parts)


def choices(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The subcommands of a parser, each described at least by its line in the list of them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {choice.dest: choice.help for choice in action._choices_actions}
            for name, subparser in action.choices.items():
                subparser.description = subparser.description or f"{sentence(lines[name])}."
                yield name, subparser


def command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """The section of a command."""
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [(spelling(action), meaning(action, parser)) for action in actions]
    return [heading(name), f"{parser.description}\n", *([table(("option", "meaning"), rows)] if rows else [])]


def heading(name: str) -> str:
    guide = f"\n\nGuide: {GUIDES[name]}." if name in GUIDES else ""
    return f"## torchdeq-ep {name}{guide}\n\n```bash\n{EXAMPLES[name]}\n```\n"


def spelling(action: argparse.Action) -> str:
    """How an option is written; in brackets if it is an argument that may be left out."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    value = {"+": f"{value} ...", "?": f"[{value}]"}.get(str(action.nargs), value)
    return f"`{' '.join(filter(None, [*action.option_strings[:1], value]))}`"


def meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """The help of an option, with its choices."""
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    named = ", ".join(f"`{choice}`" for choice in action.choices or ())
    return ": ".join(filter(None, (named, text)))


class Recorder:
    """Takes down what `TrainCLI` adds to a parser."""

    def __init__(self) -> None:
        self.options: list[tuple[str, dict[str, Any]]] = []
        self.groups: dict[str, Any] = {}
        self.linked: set[str] = set()

    def add_argument(self, name: str, **option: Any) -> None:
        self.options.append((name, option))

    def add_lightning_class_args(self, callback: Any, key: str) -> None:
        self.groups[key] = callback

    def link_arguments(self, _: str, target: str, **__: Any) -> None:
        self.linked.add(target)


def train() -> list[str]:
    """The section of `train`, whose parser is made by Lightning: the options of this package in it."""
    recorder = Recorder()
    training.TrainCLI.add_arguments_to_parser(None, recorder)  # type: ignore[arg-type]
    recipes = ", ".join(f"`{name}`" for name in training.recipes())
    rows = [("`RECIPE`", "", "", f"{recipes}, or the path of a YAML file")]
    rows += [("`--seed`", "int", "`0`", "seed of weights, order, augmentation and probes")]
    rows += [
        (f"`{name}`", kind(option["type"]), default(option["default"]), option["help"])
        for name, option in recorder.options
    ]
    rows += [("`--print_config`", "", "", "write the complete configuration as YAML, and stop")]
    columns = ("option", "type", "default", "meaning")
    parts = [heading("train"), TRAIN, table(columns, rows)]
    callbacks = {key: (sentence(summary(callback)), callback) for key, callback in recorder.groups.items()}
    for key, (title, owner) in {**GROUPS, **callbacks}.items():
        parts += [f"### --{key}.*\n\n{title.rstrip('.')}: the options of `{owner.__name__}`.\n"]
        parts += [table(columns, list(options(key, owner, recorder.linked)))]
    return parts


def options(key: str, owner: Any, linked: set[str]) -> Iterator[tuple[str, str, str, str]]:
    """A row for each parameter of a class that is not set by another option."""
    hints, texts = get_type_hints(owner.__init__), explained(owner)
    for name, parameter in inspect.signature(owner).parameters.items():
        if f"{key}.{name}" not in linked:
            yield f"`--{key}.{name}`", kind(hints[name]), default(parameter.default), texts[name]


def kind(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return "null"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (UnionType, Union):
        return " or ".join(map(kind, arguments))
    if origin is tuple:
        return f"{len(arguments)} {kind(arguments[0])}"
    if origin is Callable:
        return "function"
    if origin is dict:
        return f"dict of {kind(arguments[1])} by {kind(arguments[0])}"
    return str(hint.__name__) if origin is None else f"list of {kind(arguments[0])}"


def default(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def explained(owner: Any) -> dict[str, str]:
    """What the docstring of a class says of each parameter, in one line."""
    section = re.search(r"^Args:\n((?:    .*\n)+)", inspect.getdoc(owner) or "", re.MULTILINE)
    assert section is not None, owner
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1], re.MULTILINE)
    return {name: plain(" ".join(text.split())) for name, text in entries}


def plain(text: str) -> str:
    """Without the cross-references of the API page."""
    return re.sub(r"\[([^]]+)\]\[[^]]+\]", r"\1", text)


def summary(owner: Any) -> str:
    return (inspect.getdoc(owner) or "").partition("\n")[0]


def sentence(text: str | None) -> str:
    return f"{(text or '')[:1].upper()}{(text or '')[1:]}"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [tuple(columns), tuple("---" for _ in columns), *map(tuple, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
