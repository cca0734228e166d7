"""The command line: `list`, `compare`, `demo`, `diagnose`, `env`, `errors`, and commands of other distributions."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

from torch.nn.functional import cross_entropy

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import EPError, InvalidOptionError, unknown_name
from torchdeq_ep.measuring import (
    EXACT,
    Comparison,
    Diagnosis,
    check_plot,
    check_writable,
    compare,
    diagnose,
    environment,
    plan,
    require,
    to_rich,
    to_rich_tables,
    train_digits,
    write_text,
)
from torchdeq_ep.measuring.demo import COMPARED, EPOCHS, NEXT, courses_to_markdown, courses_to_rich, demonstrate
from torchdeq_ep.measuring.problems import Problem, load_problem
from torchdeq_ep.modes import available_backwards, describe_backward, get_backward
from torchdeq_ep.modes.registry import BUILT_IN
from torchdeq_ep.plugin_commands import exit_code, refuse_unknown, run_plugin
from torchdeq_ep.plugins import BACKWARDS, COMMANDS, by_name, entries, origin

_FAILED = 2
_INTERRUPTED = 130  # as a shell has it after Ctrl-C
_ENTRY = re.compile(r"^## (\w+)\n+(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0; 2 if something asked for does not exist or cannot be done; 130 after Ctrl-C; or that of a
        plugin.

    Example:
        >>> main(["compare", "nowhere:factory"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it: the user's own modules can be named
    commands, notes = by_name(entries(COMMANDS), _BUILT_IN)
    try:
        if arguments and arguments[0] in commands:
            _say([note for note in notes if f"{arguments[0]!r}" in note])
            return run_plugin(commands[arguments[0]], arguments[1:])
        if arguments and arguments[0] not in _BUILT_IN and not arguments[0].startswith("-"):
            refuse_unknown(arguments[0], [*_BUILT_IN, *commands])
        if arguments[:1] in (["-h"], ["--help"]):
            _say(notes)
        options = _parser(commands).parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except EPError as error:
        sys.stderr.write(f"torchdeq-ep: {error}\n")
        return _FAILED
    except KeyboardInterrupt:
        sys.stderr.write("\ntorchdeq-ep: stopped by Ctrl-C.\n")
        return _INTERRUPTED
    except SystemExit as stop:  # argparse has written the help, the version or what is wrong
        return exit_code(stop.code)


def _say(notes: Sequence[str]) -> None:
    sys.stderr.writelines(f"torchdeq-ep: {note}.\n" for note in notes)


class _Parser(argparse.ArgumentParser):
    """A parser that says which option is the nearest to one that does not exist."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = getattr(options, "parser", self)
            known = [name for action in parser._actions for name in action.option_strings]
            name = rest[0].partition("=")[0]
            raise InvalidOptionError(
                unknown_name("option", name, known)
                if name.startswith("-")
                else f"nobody knows what {' '.join(rest)!r} is for: {parser.prog} --help has what can be given."
            )
        return options


def _parser(commands: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchdeq-ep", description="Equilibrium propagation as a backward pass for torchdeq's models."
    )
    parser.add_argument("--version", action="version", version=f"torchdeq-ep {version('torchdeq-ep')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    subparsers.add_parser("list", help="name all backward modes and solvers").set_defaults(run=_list)
    _add_compare(subparsers)
    showing = subparsers.add_parser(
        "demo",
        help="train an ordinary model by four gradients, and compare them",
        description="Train a transformer block on handwritten digits by torchdeq's own gradient, by ep, by ep with "
        "homeostasis and by aep, from the same weights; then compare the gradients on the trained model.",
    )
    showing.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of training (default: {EPOCHS})")
    _add_files(showing, "alignment and accuracy against the steps of training")
    showing.set_defaults(run=_demo)

    diagnosing = subparsers.add_parser(
        "diagnose",
        help="split the error of an EP gradient into its causes, and say what to do about the largest",
        description="Split the error of an EP gradient into finite nudge, asymmetry and convergence. Without a "
        "factory, a small model of handwritten digits is trained by equilibrium propagation first.",
    )
    diagnosing.add_argument("--backward", default="ep", metavar="SPEC", help="the mode to diagnose (default: ep)")
    _add_problem_and_files(diagnosing, "alignment against amplitude")
    diagnosing.set_defaults(run=_diagnose)
    _add_texts(subparsers)
    for name, entry in commands.items():
        subparsers.add_parser(name, help=f"from {origin(entry)}", add_help=False)
    for subparser in subparsers.choices.values():
        subparser.set_defaults(parser=subparser)
    return parser


def _add_compare(subparsers: Any) -> None:
    comparing = subparsers.add_parser(
        "compare",
        help="measure backward modes on a model: how exact, how fast, how large",
        description="Measure backward modes on a model and a batch. Without a factory, a small model of handwritten "
        "digits is trained by equilibrium propagation first.",
    )
    comparing.add_argument(
        "--backward",
        action="append",
        metavar="SPEC",
        help="a mode, e.g. ep or hep:n_points=6; repeatable; default: all",
    )
    comparing.add_argument(
        "--solver",
        action="append",
        metavar="NAME",
        help="a solver of torchdeq, or 'own' for the package's; repeatable; default: own",
    )
    _add_problem_and_files(comparing, "error against time")
    comparing.add_argument(
        "--exact",
        choices=EXACT,
        default="equilibrium",
        help="what errors are relative to: the gradient of the equilibrium, or that through the steps made "
        "(default: equilibrium)",
    )
    comparing.add_argument("--repeats", type=int, default=5, metavar="N", help="timings of each mode (default: 5)")
    comparing.set_defaults(run=_compare)


def _add_texts(subparsers: Any) -> None:
    telling = subparsers.add_parser("env", help="print versions and settings, for a report")
    telling.add_argument("--json", action="store_true", help="as JSON")
    telling.set_defaults(run=_env)
    explaining = subparsers.add_parser("errors", help="print what the documentation says about an error or warning")
    explaining.add_argument("name", nargs="?", metavar="NAME", help="class of the error; default: list them")
    explaining.set_defaults(run=_errors)


def _add_problem_and_files(parser: argparse.ArgumentParser, picture: str) -> None:
    parser.add_argument(
        "factory",
        nargs="?",
        metavar="package.module:factory",
        help="a function without arguments that returns (model, batch, loss_fn)",
    )
    _add_files(parser, picture)


def _add_files(parser: argparse.ArgumentParser, picture: str) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--plot", metavar="FILE", help=f"draw {picture} (.png, .svg, .pdf)")


def _list(options: argparse.Namespace) -> int:
    from torchdeq.solver import _solvers

    modes = [(name, _description(name)) for name in available_backwards()]
    solvers = [("own", "The package's own relaxation, used unless another is named.")]
    solvers += [(name, _first_line(solver)) for name, solver in _solvers.items()]
    for title, rows in (("backward modes", modes), ("solvers", solvers)):
        sys.stdout.write(f"{title}\n")
        width = max(len(name) for name, _ in rows)
        sys.stdout.writelines(f"  {name:{width}}  {text}\n" for name, text in rows)
    _say(by_name(entries(BACKWARDS), BUILT_IN)[1])
    return 0


def _description(name: str) -> str:
    try:
        return describe_backward(name)
    except Exception as error:  # a plugin that cannot be imported hides no other mode
        return f"({(str(error) or type(error).__name__).splitlines()[0]})"


def _env(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    for title, values in found.items():
        sys.stdout.write(f"{title}\n")
        width = max(len(name) for name in values)
        sys.stdout.writelines(f"  {name:{width}}  {value}\n" for name, value in values.items())
    return 0


def _errors(options: argparse.Namespace) -> int:
    page = Path(__file__).with_name("errors.md")  # put there in a wheel
    page = page if page.is_file() else Path(__file__).parents[1] / "docs" / "errors.md"
    explained = dict(_ENTRY.findall(page.read_text(encoding="utf-8")))
    if options.name is None:
        sys.stdout.writelines(f"{name}\n" for name in explained)
    elif options.name in explained:
        sys.stdout.write(f"{options.name}\n\n{explained[options.name].rstrip()}\n")
    else:
        raise InvalidOptionError(unknown_name("error", options.name, explained))
    return 0


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _compare(options: argparse.Namespace) -> int:
    solvers = [None if name == "own" else name for name in options.solver or ["own"]]
    plan(options.backward, solvers)
    check_count("--repeats", options.repeats)
    console, (model, batch, loss_fn) = _prepare(options)
    with _progress(console) as show:
        table = compare(
            model,
            batch,
            loss_fn,
            options.backward,
            solvers,
            exact=options.exact,
            repeats=options.repeats,
            on_progress=show,
        )
    _show(console, table)
    _write_results(options, table, f"{table.to_markdown()}\n\n{table.sentence()}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    check_count("--epochs", options.epochs)
    console = _console(options)
    with _progress(console) as show:
        shown = demonstrate(options.epochs, show)
    console.print("A transformer block trained on digits by four gradients, from the same weights:\n", highlight=False)
    console.print(courses_to_rich(shown.courses))
    console.print("The gradients on the model that was trained by ep with homeostasis:", highlight=False)
    with _progress(console) as show:
        table = compare(shown.model, shown.batch, cross_entropy, COMPARED, repeats=3, on_progress=show)
    _show(console, table)
    markdown = f"{courses_to_markdown(shown.courses)}\n\n{table.to_markdown()}\n\n{table.sentence()}"
    _write_files(options, {**shown.to_dict(), "comparison": table.to_dict()}, markdown, shown.plot)
    console.print(f"\n{NEXT}", markup=False, highlight=False)
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    get_backward(options.backward)
    console, (model, batch, loss_fn) = _prepare(options)
    with _progress(console) as show:
        diagnosis = diagnose(model, batch, loss_fn, options.backward, on_progress=show)
    console.print(*to_rich_tables(diagnosis), sep="\n")
    for layer in diagnosis.layers:
        for note in layer.notes:
            console.print(f"{layer.name or 'the DEQ'}: {note}", markup=False, highlight=False, style="dim")
    for line in diagnosis.advice:
        console.print(line, markup=False, highlight=False)
    _write_results(options, diagnosis, diagnosis.to_markdown())
    return 0


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that is drawn when it is told of a step and at no other time: a thread would compete with what is timed."""
    bars = require("rich.progress", "rich", "The progress bar")
    escape = require("rich.markup", "rich", "The progress bar").escape  # a spec may look like formatting
    with bars.Progress(console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(
            bar, description=escape(what), completed=done, total=total, refresh=True
        )


def _prepare(options: argparse.Namespace) -> tuple[Any, Problem]:
    console = _console(options)
    return console, _trained_digits(console) if options.factory is None else load_problem(options.factory)


def _console(options: argparse.Namespace) -> Any:
    """Where to print. Files that cannot be written are refused here, before a measurement that may take long."""
    if options.json not in (None, "-"):
        check_writable(options.json)
    if options.markdown is not None:
        check_writable(options.markdown)
    if options.plot is not None:
        check_plot(options.plot)
    # Standard output is for the figures alone if they go there.
    return require("rich.console", "rich", "The table in the terminal").Console(stderr=options.json == "-")


def _write_results(options: argparse.Namespace, results: Comparison | Diagnosis, markdown: str) -> None:
    _write_files(options, results.to_dict(), markdown, results.plot)


def _write_files(
    options: argparse.Namespace, figures: dict[str, Any], markdown: str, plot: Callable[[str], object]
) -> None:
    _write_json(options.json, figures)
    if options.markdown is not None:
        write_text(options.markdown, f"{markdown}\n")
    if options.plot is not None:
        plot(options.plot)


def _trained_digits(console: Any) -> Problem:
    progress_module = require("rich.progress", "rich", "The progress bar")
    with progress_module.Progress(console=console, transient=True, refresh_per_second=2) as progress:
        bar = progress.add_task("training a DEQ on handwritten digits by equilibrium propagation", total=None)
        trained = train_digits("ep", lambda done, total: progress.update(bar, completed=done, total=total))
    console.print(f"A DEQ trained on digits by equilibrium propagation: {trained.accuracy:.1%} right on unseen digits.")
    return trained.model, trained.batch, trained.loss_fn


def _show(console: Any, table: Comparison) -> None:
    console.print(to_rich(table, console.width))
    # A narrow terminal, or a pipe, wraps what follows; markup in a message would be taken for formatting.
    for row in table.rows:
        for note in row.notes:
            console.print(f"{row.label}: {note}", markup=False, highlight=False, style="dim")
    for note in table.warnings:
        console.print(f"reference: {note}", markup=False, highlight=False, style="dim")
    console.print(table.conditions(), markup=False, highlight=False)
    console.print(table.sentence(), markup=False, highlight=False)


def _write_json(target: str | None, figures: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(target, text)


_BUILT_IN = ("list", "compare", "demo", "diagnose", "env", "errors")


if __name__ == "__main__":
    sys.exit(main())
