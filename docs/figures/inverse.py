"""Time, memory and error of gradients through a reconstruction of deepinv's, beside its own backward hook.

    python docs/figures/inverse.py

deepinv must be installed. Results go to `docs/results/inverse.json` and the table of `docs/inverse.md`. The model is
that of deepinv's own example of a deep equilibrium: proximal gradient steps on blurred images with a DnCNN for a
denoiser, here of four layers and with random weights, scaled so that the steps contract.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import deepinv
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import torchdeq_ep as tep
from torchdeq_ep.measuring import write_text
from torchdeq_ep.measuring.costs import milliseconds, peak_memory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from pages import insert  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "results" / "inverse.json", ROOT / "docs" / "inverse.md"
OPENING, CLOSING = "<!-- The table is written by docs/figures/inverse.py. -->", "<!-- End of the table. -->"
SIZE, BATCH, REPEATS = 64, 4, 5
CPU = torch.device("cpu")
MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ift", {}),
    ("aep", {}),
    ("ep", {}),
    ("one-step", {}),
    ("neumann:k=10", {}),
)


class Residual(nn.Module):
    """deepinv's DnCNN as a correction of its input that contracts."""

    def __init__(self) -> None:
        super().__init__()
        self.network = deepinv.models.DnCNN(1, 1, depth=4, nf=32, pretrained=None)

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """Denoised images."""
        return 0.8 * x + 0.03 * torch.tanh(self.network(x, sigma))


def main() -> None:
    """Measure, and write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    picture = torch.tensor(load_sample_image("china.jpg").mean(2) / 255, dtype=torch.float32)
    images = torch.stack([picture[100 + 64 * k : 164 + 64 * k, 200:264] for k in range(BATCH)])[:, None]
    physics = deepinv.physics.BlurFFT(img_size=(1, SIZE, SIZE), filter=torch.ones(1, 1, 3, 3) / 9)
    y, denoiser = physics(images), Residual()
    options: dict[str, Any] = {"max_iter": 200, "crit_conv": "residual", "thres_conv": 1e-6, "DEQ": True}
    model = deepinv.optim.PGD(
        data_fidelity=deepinv.optim.L2(),
        prior=deepinv.optim.PnP(denoiser=denoiser),
        stepsize=0.5,
        sigma_denoiser=0.03,
        **options,
    )
    parameters = list(denoiser.parameters())

    def loss() -> Tensor:
        return (model(y, physics) - images).square().mean()

    def gradient() -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss(), parameters)])

    with tep.use_backward(model, "ift", tol=1e-7, max_iter=300):
        exact = gradient()
    rows = {"deepinv's own hook": None, **{name: (name, more) for name, more in MODES}}
    measured = {}
    for name, mode in rows.items():
        handle = None if mode is None else tep.use_backward(model, mode[0], **mode[1])
        difference = gradient() - exact
        value = loss()
        memory = peak_memory(lambda value=value: torch.autograd.grad(value, parameters, retain_graph=True), CPU)
        measured[name] = {"error": float(difference.norm() / exact.norm()), "mib": memory / 2**20}
        if handle is not None:
            handle.remove()

    def timed(mode: Any) -> Any:
        if mode is None:
            return gradient

        def switched() -> Tensor:
            with tep.use_backward(model, mode[0], **mode[1]):
                return gradient()

        return switched

    times, _ = milliseconds({k: timed(mode) for k, mode in enumerate(rows.values())}, CPU, REPEATS)
    for k, name in enumerate(rows):
        measured[name]["milliseconds"] = times[k]
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    write_text(PAGE, insert(PAGE.read_text(), OPENING, CLOSING, table(measured)))
    sys.stdout.write(table(measured) + "\n")


def table(measured: dict[str, dict[str, float]]) -> str:
    """The results in Markdown, times and memory relative to deepinv's own."""
    own = measured["deepinv's own hook"]
    lines = ["| gradient | error | time of a step | peak memory of the backward pass |", "|---|---:|---:|---:|"]
    for name, row in measured.items():
        label = f"`{name}`" if row is not own else name
        time, memory = row["milliseconds"] / own["milliseconds"], row["mib"] / own["mib"]
        lines.append(f"| {label} | {row['error']:.1e} | {time:.2f} | {memory:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
