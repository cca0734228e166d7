"""One run of a recipe: configuration, trainer, resumption, and the record of what came out."""

from __future__ import annotations

import json
import os
import pickle
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import unknown_name, write_text
from torchdeq_ep_lightning.arguments import as_written, check_numbers, first_words, refuse_unknown_options
from torchdeq_ep_lightning.callbacks import AlignmentMonitor, Homeostasis, NudgeStats, SwapBackward
from torchdeq_ep_lightning.data import ImageData
from torchdeq_ep_lightning.flavour import (
    Callback,
    CSVLogger,
    LightningArgumentParser,
    LightningCLI,
    MisconfigurationException,
    RichProgressBar,
    TensorBoardLogger,
    Trainer,
)
from torchdeq_ep_lightning.module import VectorFieldClassifier
from torchdeq_ep_lightning.quiet import quiet_lightning
from torchdeq_ep_lightning.resuming import BEFORE, CHECKPOINT, Record, Saver, newest_checkpoint

RECIPES = Path(__file__).parent / "recipes"
RESULT = "result.json"
_CONFIG = "config.yaml"
# What may differ between the two halves of a resumed run.
_FREE_KEYS = (
    *("out", "fresh", "quiet", "config", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("checkpoint_every", "data.workers", "data.cache"),
)
# What may only grow: how far a run goes. `None` and -1 are without an end.
_EXTENT = ("trainer.max_epochs", "trainer.max_steps")


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        recipe: Name of the recipe.
        backward: Spec of the mode, or a schedule of them.
        seed: The seed.
        history: Measurements at the end of each epoch, by name.
        out: Directory of the run.
    """

    recipe: str
    backward: Any
    seed: int
    history: tuple[dict[str, float], ...]
    out: Path

    @property
    def last(self) -> dict[str, float]:
        """Measurements at the end."""
        return self.history[-1]


class TrainCLI(LightningCLI):
    """Lightning's command line with the options of this package: modes, homeostasis, measurements, results."""

    further: Sequence[Callback] = ()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--backward", type=str | dict[int, str], default="ep", help="mode, or modes by epoch")
        parser.add_argument("--out", type=str | None, default=None, help="directory of the results")
        parser.add_argument("--fresh", type=bool, default=False, help="start over instead of resuming")
        parser.add_argument("--quiet", type=bool, default=False, help="no progress bar and no summary")
        parser.add_argument("--checkpoint_every", type=int, default=100, help="steps between two checkpoints")
        for callback, key in (
            (SwapBackward, "swap"),
            (Homeostasis, "homeostasis"),
            (AlignmentMonitor, "alignment"),
        ):
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments("backward", "swap.backward")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "homeostasis.seed")
        parser.link_arguments("data.shape", "model.shape", apply_on="instantiate")
        parser.link_arguments("data.n_classes", "model.n_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns if the process has other arguments.
        refuse_unknown_options(args, [name for action in parser._actions for name in action.option_strings])
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise InvalidOptionError(first_words(str(error), parser)) from error
        check_numbers(self.config)

    def before_instantiate_classes(self) -> None:
        config = self.config
        # Refused here, before any data are read.
        swap = config.swap
        SwapBackward(config.backward, **{name: value for name, value in vars(swap).items() if name != "backward"})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config
        out = Path(config.out)
        self.record = Record()
        self.resumed = newest_checkpoint(out, speak=_leads())
        saver = Saver(out, config.checkpoint_every, self.resumed)
        extra: list[Callback] = [NudgeStats(), self.record]
        if config.trainer.enable_progress_bar is None and config.quiet:
            kwargs["enable_progress_bar"] = False
        elif config.trainer.enable_progress_bar is not False:
            extra.append(RichProgressBar(leave=False))
        if config.quiet:
            kwargs["enable_model_summary"] = False
        if config.trainer.logger is None:
            kwargs["logger"] = [CSVLogger(out, name="csv"), TensorBoardLogger(out, name="tensorboard")]
        extra_callbacks = [self._get(self.config_init, key) for key in self.parser.callback_keys]
        settings = {**self.config_init.trainer, **kwargs, "default_root_dir": str(out)}
        theirs = settings["callbacks"] or []
        settings["callbacks"] = [saver, *(theirs if isinstance(theirs, list) else [theirs])]
        return self._instantiate_trainer(settings, [*extra_callbacks, *extra, *self.further])


def recipes() -> dict[str, Path]:
    """The recipes of this package by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: Name of one of this package's, or the path of a YAML file.

    Returns:
        Its path.

    Raises:
        InvalidOptionError: If there is none.

    Example:
        >>> find_recipe("digits-mlp").name
        'digits-mlp.yaml'
    """
    known = recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InvalidOptionError(f"there is no recipe file {path}.")
    raise InvalidOptionError(f"{unknown_name('recipe', name, known)} Or give the path of a YAML file.")


def check(recipe: str, overrides: Sequence[str] = ()) -> ImageData:
    """Refuse what [`run`][torchdeq_ep_lightning.training.run] would refuse before it reads data; nothing is written.

    Args:
        recipe: As for `run`.
        overrides: As for `run`.

    Returns:
        The images that it would read.

    Raises:
        InvalidOptionError: If the recipe does not exist, or an option is not acceptable.
    """
    path = find_recipe(recipe)
    with quiet_lightning():
        cli = _parse(path, as_written(overrides))
        cli.before_instantiate_classes()
    return ImageData(**cli.config.data.as_dict())


def run(recipe: str, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> Result:
    """Train a recipe, resume it, or return its result if it is finished.

    Args:
        recipe: Name of a recipe, or the path of a YAML file.
        overrides: Options in the form of the command line, e.g. `["--backward", "hep", "--model.angle", "90"]`.
        callbacks: Further ones.

    Returns:
        The measurements.

    Raises:
        InvalidOptionError: If the recipe does not exist, an option is not acceptable, the directory holds a run of
            another configuration, or processes are to be spawned, which the model cannot follow.
        KeyboardInterrupt: After Ctrl-C; the same call goes on from the last checkpoint.
    """
    path = find_recipe(recipe)
    with quiet_lightning():
        cli = _configure(path, as_written(overrides))
        config = cli.config
        out = Path(config.out)
        finished = _read_result(out, _extent(config)) if not config.fresh else None
        if finished is not None:
            return finished
        cli.further = list(callbacks)
        try:
            cli.instantiate()
        except MisconfigurationException as error:
            raise InvalidOptionError(str(error)) from error
        trainer = cli.trainer
        _refuse_spawn(trainer, cli.model)
        resumed = None if cli.resumed is None else str(cli.resumed)
        try:
            trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=False)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            raise
        result = Result(path.stem, config.backward, config.seed_everything, tuple(cli.record.history), out)
        if trainer.is_global_zero and trainer.state.finished:
            plain = {**vars(result), "out": str(out), "extent": _extent(config)}
            write_text(out / RESULT, json.dumps(plain, indent=1) + "\n")
    return result


def _refuse_spawn(trainer: Trainer, model: Any) -> None:
    """Refuse processes that are given a model by pickle, where it cannot be."""
    if getattr(trainer.strategy.launcher, "_start_method", "fork") != "spawn":
        return
    try:
        pickle.dumps(model)
    except Exception as error:
        raise InvalidOptionError(
            "--trainer.strategy: processes that are spawned get the model by pickle, and a DEQ with torchdeq's own "
            f"backward has none ({error}). Use --trainer.strategy ddp, which starts the command once more for each."
        ) from error


class _Cli(TrainCLI):
    """Parses at once, and instantiates when asked."""

    def instantiate_classes(self) -> None:
        return

    def instantiate(self) -> None:
        super().instantiate_classes()


def _parse(path: Path, arguments: list[str]) -> _Cli:
    return _Cli(
        VectorFieldClassifier,
        ImageData,
        save_config_callback=None,
        trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=["--config", str(path), *arguments],
        run=False,
        parser_kwargs={"exit_on_error": False},
    )


def _configure(path: Path, arguments: list[str]) -> _Cli:
    cli = _parse(path, arguments)
    config = cli.config
    if config.out is None:
        slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in str(config.backward))
        config.out = str(Path("runs") / path.stem / f"{slug}-seed{config.seed_everything}")
    out = Path(config.out)
    plain = yaml.safe_load(cli.parser.dump(config, skip_link_targets=True, format="yaml"))
    saved = out / _CONFIG
    # What has a configuration alone never came to train: the next try may be another.
    is_begun = not config.fresh and any((out / name).exists() for name in (RESULT, CHECKPOINT, BEFORE))
    before = _saved_configuration(saved) if is_begun else None
    if before is not None:
        _refuse_other(before, plain, out)
    if _leads() and plain != before:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidOptionError(f"cannot make the directory {out}: {error}") from error
        for stale in (RESULT, CHECKPOINT, BEFORE) if before is None else ():
            (out / stale).unlink(missing_ok=True)
        write_text(saved, yaml.safe_dump(plain, sort_keys=False))
    return cli


def _leads() -> bool:
    """Whether this process is the first of a run: the one that writes and speaks."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))


def _saved_configuration(path: Path) -> dict[str, Any] | None:
    """That of the run in this directory, `None` if there is no run."""
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise InvalidOptionError(
            f"{path} is damaged, so nobody can tell which run is in this directory: put back the file, give another "
            "--out, or --fresh true to start over."
        )
    return found


def _refuse_other(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    one, other = _flat(before), _flat(now)
    for key in sorted(one.keys() | other.keys()):
        was, wanted = one.get(key), other.get(key)
        if key in _FREE_KEYS or was == wanted or (key in _EXTENT and _is_more(wanted, was)):
            continue
        raise InvalidOptionError(
            f"{out} holds a run with {key}={was!r}, which cannot be resumed with {wanted!r}: "
            + ("a run can be made longer, not shorter. Give " if key in _EXTENT else "give ")
            + "another --out, or --fresh true to start over."
        )


def _is_more(one: int | None, other: int | None) -> bool:
    endless = (None, -1)
    return one in endless or (other not in endless and one > other)


def _extent(config: Any) -> dict[str, int | None]:
    return {key: config[key] for key in _EXTENT}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: value
        for key, entry in tree.items()
        for path, value in _flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _read_result(out: Path, extent: dict[str, int | None]) -> Result | None:
    """The result of a finished run, `None` if there is none, or if it has been made longer since."""
    try:
        plain = json.loads((out / RESULT).read_text(encoding="utf-8"))
        if plain.get("extent", extent) != extent:
            return None
        return Result(plain["recipe"], plain["backward"], plain["seed"], tuple(plain["history"]), out)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
