"""The commands `torchdeq-ep train` and `torchdeq-ep sweep`."""

from __future__ import annotations

import sys

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_lightning.flavour import rank_zero_only
from torchdeq_ep_lightning.resuming import latest
from torchdeq_ep_lightning.training import recipes, run

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""

_USAGE = """usage: torchdeq-ep train RECIPE [--backward MODE] [--seed N] [--out DIR] [--KEY VALUE ...]

Train a network of the papers. The same command again resumes a run that was stopped.

  RECIPE            {names},
                    or the path of a YAML file
  --backward MODE   how gradients are computed: ift, ep, hep, ... with options, e.g. hep:n_points=4,beta=0.5
  --seed N          seed of weights, order, augmentation and probes (default: 0)
  --out DIR         where everything is written (default: runs/RECIPE/MODE-seedN)
  --fresh true      start over
  --quiet true      no progress bar
  --KEY VALUE       any key of the recipe, e.g. --model.angle 90 --trainer.max_epochs 5 --trainer.devices 2
  --print_config    write the complete configuration as YAML
"""


def train(arguments: list[str]) -> int:
    """Run `torchdeq-ep train`.

    Args:
        arguments: What follows `train`.

    Returns:
        The exit code.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE.format(names=", ".join(recipes())))
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        raise InvalidOptionError(f"the recipe comes first, and then {arguments[0]}: torchdeq-ep train RECIPE ...")
    try:
        result = run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        sys.stderr.write("\ntorchdeq-ep: stopped by Ctrl-C; the same command goes on from the last checkpoint.\n")
        return INTERRUPTED
    if getattr(rank_zero_only, "rank", 0):
        return 0
    last, tested = result.last, latest(result.history, "test/error")
    # An epoch that was cut short, for instance by trainer.max_steps, is not tested.
    right = "not tested" if tested is None else f"{100 - tested['test/error']:.2f} % right"
    place = "" if tested is None or tested["epoch"] == last["epoch"] else f"{tested['epoch']} of "
    epochs = f"{place}{last['epoch']} epoch{'' if last['epoch'] == 1 else 's'}"
    sys.stdout.write(
        f"{result.recipe}, {result.backward}, seed {result.seed}: {right} after {epochs}, "
        f"{last['seconds']:.0f} s; results in {result.out}\n"
    )
    missed = last.get("nudge/unconverged", 0.0)
    if missed:
        sys.stdout.write(f"{missed:.1%} of the backward solves of the last epoch missed their tolerance\n")
    return 0


def sweep(arguments: list[str]) -> int:
    """Run `torchdeq-ep sweep`.

    Args:
        arguments: What follows `sweep`.

    Returns:
        The exit code.
    """
    from torchdeq_ep_lightning.sweep import main

    return main(arguments)
