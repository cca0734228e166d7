"""Lightning, from the package that the user has imported: `lightning` or `pytorch_lightning`.

The two hold the same classes twice, and a trainer of one does not take a module of the other. The one that is imported
first is taken; if none is yet, `pytorch_lightning`, or `lightning` where that one alone is installed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _package() -> str:
    imported = [name for name in sys.modules if name in PACKAGES]
    if imported:
        return imported[0]
    return PACKAGES[0] if find_spec(PACKAGES[0]) else PACKAGES[1]


PACKAGE = _package()
"""The name of the package in use."""

if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningDataModule as LightningDataModule
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning.callbacks import Checkpoint as Checkpoint
    from pytorch_lightning.callbacks import RichProgressBar as RichProgressBar
    from pytorch_lightning.cli import LightningArgumentParser as LightningArgumentParser
    from pytorch_lightning.cli import LightningCLI as LightningCLI
    from pytorch_lightning.loggers import CSVLogger as CSVLogger
    from pytorch_lightning.loggers import TensorBoardLogger as TensorBoardLogger
    from pytorch_lightning.utilities import rank_zero_only as rank_zero_only
else:
    _HOMES = {
        "": ("Callback", "LightningDataModule", "LightningModule", "Trainer"),
        ".callbacks": ("Checkpoint", "RichProgressBar"),
        ".cli": ("LightningArgumentParser", "LightningCLI"),
        ".loggers": ("CSVLogger", "TensorBoardLogger"),
        ".utilities": ("rank_zero_only",),
        ".utilities.exceptions": ("MisconfigurationException",),
    }
    for _home, _names in _HOMES.items():
        for _name in _names:
            globals()[_name] = getattr(import_module(PACKAGE + _home), _name)
