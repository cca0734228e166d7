"""The plugin with `lightning` and with `pytorch_lightning`: the one that the user has imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

USE = """
import sys
import {package} as L
import torchdeq_ep_lightning as plugin
from torchdeq_ep_lightning.flavour import PACKAGE
from torchdeq_ep_lightning.training import run

assert PACKAGE == "{package}"
data = plugin.ImageData(batch=20, train_limit=40, test_limit=20)
model = plugin.VectorFieldClassifier((1, 8, 8), 10, hidden=[8, 8], free_tol=1e-3)
assert isinstance(model, L.LightningModule) and isinstance(data, L.LightningDataModule)
callbacks = [plugin.SwapBackward("ep"), plugin.Homeostasis(0.1), plugin.NudgeStats(), plugin.AlignmentMonitor(1, 2)]
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=0, **quiet)
trainer.fit(model, data)
assert -1 <= trainer.callback_metrics["alignment/cosine"] <= 1
small = "--model.hidden [8,8] --data.train_limit 40 --data.batch 20 --trainer.max_epochs 1 --quiet true"
assert len(run("digits-mlp", [*small.split(), "--trainer.accelerator", "cpu", "--out", "out"]).history) == 1
other = {{"pytorch_lightning", "lightning.pytorch"}} - {{PACKAGE}}
assert not other & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_package_that_is_imported_is_the_one_in_use(tmp_path, package):
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-W", "ignore", "-c", USE.format(package=package)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
