"""The demonstration: an ordinary transformer block as a DEQ, trained on digits by four gradients, side by side.

Nothing about the block suits equilibrium propagation: no weight is tied to another, so its Jacobian is not symmetric.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq import get_deq

from torchdeq_ep.errors import EPWarning
from torchdeq_ep.host import use_backward
from torchdeq_ep.measuring.digits import Batch, load_digits
from torchdeq_ep.measuring.files import plain, require
from torchdeq_ep.measuring.plots import check_plot
from torchdeq_ep.measuring.style import COLOURS, INK, dress, new_figure, save
from torchdeq_ep.state import cosine

EPOCHS, MEASURED_EVERY = 3, 12
NEXT = (
    "Next, your own model: write a function without arguments that returns (model, batch, loss_fn), and run\n"
    "  torchdeq-ep diagnose package.module:function"
)
COMPARED = ("ift", "ep-one-sided", "ep", "aep")
_BATCH, _SEEN, _RATE = 50, 1437, 2e-3
_EXACT = "ift:tol=1e-5"


@dataclass(frozen=True)
class Contender:
    """A gradient to train by.

    Args:
        name: What the figure calls it.
        backward: The mode; `None` for torchdeq's own.
        homeostasis: As for [`use_backward`][torchdeq_ep.use_backward].
    """

    name: str
    backward: str | None = None
    homeostasis: Literal["auto"] | None = None


CONTENDERS = (
    Contender("torchdeq's own"),
    Contender("ep", "ep"),
    Contender("ep with homeostasis", "ep", "auto"),
    Contender("aep", "aep"),
)


class DigitsBlock(nn.Module):
    """A pre-norm transformer block over the eight rows of an image, as tokens of 32 features, iterated to equilibrium.

    Example:
        >>> DigitsBlock()(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.read_in, self.places = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.read_out = nn.Sequential(nn.LayerNorm(32), nn.Flatten(), nn.Linear(256, 10))
        self.deq = get_deq(ift=True, f_solver="anderson", f_tol=1e-3, f_max_iter=40)

    def block(self, z: Tensor, x: Tensor) -> Tensor:
        """One step of the map whose fixed point is the state."""
        normed = self.norms[0](z)
        hidden = x + 0.5 * self.attention(normed, normed, normed, need_weights=False)[0]
        value: Tensor = hidden + 0.5 * self.down(functional.gelu(self.up(self.norms[1](hidden))))
        return value

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits for images of shape `(B, 8, 8)`."""
        x = self.read_in(images) + self.places
        states, _ = self.deq(lambda z: self.block(z, x), torch.zeros_like(x))
        logits: Tensor = self.read_out(states[-1])
        return logits


@dataclass(frozen=True)
class Course:
    """How training by one gradient went.

    Args:
        name: Of the contender.
        steps: After which it was measured.
        accuracy: On images that were not trained on.
        alignment: Cosine of the gradient that it trains by to the exact one, on such images.
        seconds: Of the training alone.
    """

    name: str
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    alignment: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Demonstration:
    """The courses of all contenders, and the model that was trained by equilibrium propagation with homeostasis.

    Args:
        courses: In the order of `CONTENDERS`.
        model: The trained model.
        batch: Images that it was not trained on.
    """

    courses: tuple[Course, ...]
    model: DigitsBlock
    batch: Batch

    def to_dict(self) -> dict[str, Any]:
        """The courses as plain data.

        Returns:
            Ready for JSON.
        """
        whole: dict[str, Any] = plain({"courses": [asdict(course) for course in self.courses]})
        return whole

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw accuracy and alignment in the course of training.

        Args:
            path: File to write, if any.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
            InvalidOptionError: If the file cannot be written.
        """
        if path is not None:
            check_plot(path)
        figure = draw_courses(self.courses)
        if path is not None:
            save(figure, path)
        return figure


def demonstrate(epochs: int = EPOCHS, on_progress: Callable[[str, int, int], None] | None = None) -> Demonstration:
    """Train the block by each contender, from the same weights on the same batches.

    Args:
        epochs: Passes through the 1,437 images.
        on_progress: Called as `on_progress(what, done, total)` after each step.

    Returns:
        What came of it. The caller's random state is left alone.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    pixels, digits = load_digits()
    images = pixels.view(-1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(len(images))
        seen, unseen = order[:_SEEN], order[_SEEN:]
        batches = [rows for _ in range(epochs) for rows in torch.split(seen[torch.randperm(len(seen))], _BATCH)]
        start = DigitsBlock()
        courses: list[Course] = []
        trained = start
        test, total = (images[unseen], digits[unseen]), len(batches) * len(CONTENDERS)
        for contender in CONTENDERS:
            model, done = copy.deepcopy(start), len(courses) * len(batches)

            def tell(step: int, accuracy: float, name: str = contender.name, done: int = done) -> None:
                if on_progress is not None:
                    on_progress(f"{name}: {accuracy:.0%} right on unseen digits", done + step, total)

            courses.append(_train(model, contender, [(images[rows], digits[rows]) for rows in batches], test, tell))
            trained = model if contender.homeostasis else trained
    return Demonstration(tuple(courses), trained, (images[unseen[:_BATCH]], digits[unseen[:_BATCH]]))


def _train(
    model: DigitsBlock, contender: Contender, batches: list[Batch], test: Batch, tell: Callable[[int, float], None]
) -> Course:
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    steps: list[int] = []
    measured: list[tuple[float, float]] = []
    seconds = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EPWarning)  # that the block is not symmetric is what is shown here
        handle = None
        if contender.backward is not None:
            handle = use_backward(model, contender.backward, homeostasis=contender.homeostasis)
        for step, (images, digits) in enumerate(batches):
            if step % MEASURED_EVERY == 0:
                steps.append(step)
                measured.append(_measure(model, contender, test))
            began = time.perf_counter()
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(images), digits))
            optimizer.step()
            seconds += time.perf_counter() - began
            tell(step + 1, measured[-1][0])
        steps.append(len(batches))
        measured.append(_measure(model, contender, test))
        if handle is not None:
            handle.remove()
    optimizer.zero_grad()
    accuracy, alignment = zip(*measured, strict=True)
    return Course(contender.name, tuple(steps), accuracy, alignment, seconds)


def _measure(model: DigitsBlock, contender: Contender, test: Batch) -> tuple[float, float]:
    """The share of right answers, and the cosine of the contender's gradient to the exact one."""
    twin = DigitsBlock()  # which has torchdeq's own backward, and no homeostasis
    twin.load_state_dict(model.state_dict())
    twin.eval()
    with torch.no_grad():
        right = twin(test[0]).argmax(dim=1) == test[1]
    twin.train()
    own, exact = (_gradient(twin, backward, test) for backward in (contender.backward, _EXACT))
    return float(right.float().mean()), cosine(own, exact)


def _gradient(model: DigitsBlock, backward: str | None, test: Batch) -> Tensor:
    """Of all that the loss reaches through the equilibrium."""
    reached = [parameter for name, parameter in model.named_parameters() if not name.startswith("read_out")]
    handle = None if backward is None else use_backward(model, backward)
    loss = functional.cross_entropy(model(test[0][: 2 * _BATCH]), test[1][: 2 * _BATCH])
    gradients = torch.autograd.grad(loss, reached)
    if handle is not None:
        handle.remove()
    return torch.cat([gradient.flatten() for gradient in gradients])


_HEADINGS = ("trained by", "accuracy", "cosine to the exact gradient", "seconds")


def _cells(courses: tuple[Course, ...]) -> list[list[str]]:
    return [[c.name, f"{c.accuracy[-1]:.1%}", f"{c.alignment[-1]:.2f}", f"{c.seconds:.1f}"] for c in courses]


def courses_to_markdown(courses: tuple[Course, ...]) -> str:
    """Where each course ended, as a table in Markdown.

    Args:
        courses: What to show.

    Returns:
        The lines of the table.
    """
    lines = [list(_HEADINGS), ["---", "---:", "---:", "---:"], *_cells(courses)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def courses_to_rich(courses: tuple[Course, ...]) -> Any:
    """Where each course ended, as a table for a terminal.

    Args:
        courses: What to show.

    Returns:
        A `rich.table.Table`.

    Raises:
        MissingDependencyError: If rich is not installed.
    """
    rich_table = require("rich.table", "rich", "A table in the terminal")
    box = require("rich.box", "rich", "A table in the terminal").SIMPLE_HEAD
    table = rich_table.Table(box=box, pad_edge=False)
    for k, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if k else "left")
    for cells in _cells(courses):
        table.add_row(*cells)
    return table


def _lower_end(curves: list[tuple[float, ...]]) -> float:
    """Where the axis of the accuracy begins: the last steps are told apart, the first ones come from below."""
    return max(0.0, 1 - 4 * (1 - min(values[-1] for values in curves)))


def draw_courses(courses: tuple[Course, ...]) -> Any:
    """Two panels over the steps of training: how well the gradient is aligned, and how many answers are right.

    Args:
        courses: What to draw.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(10.0, 4.4)
    figure.set_layout_engine("constrained")
    styles = [(COLOURS[0], "--", "o"), (COLOURS[7], "-", "s"), (COLOURS[2], "-", "D"), (COLOURS[3], ":", "^")]
    panels = (
        ("How well is the gradient aligned?", "cosine to the exact gradient", [course.alignment for course in courses]),
        ("How well does the model learn?", "right on unseen digits", [course.accuracy for course in courses]),
    )
    for k, (title, label, curves) in enumerate(panels):
        axes = figure.add_subplot(1, 2, k + 1)
        dress(axes)
        for course, values, (colour, line, marker) in zip(courses, curves, styles, strict=False):
            words = f"{course.name}: {values[-1]:.2f}" if k == 0 else f"{course.name}: {values[-1]:.1%}"
            axes.plot(course.steps, values, color=colour, linestyle=line, marker=marker, markersize=4, label=words)
        axes.set_title(title, loc="left", color=INK, fontsize=13)
        axes.set_xlabel("steps of training", color=INK)
        axes.set_ylabel(label, color=INK)
        low = min(0.0, *(min(values) for values in curves)) if k == 0 else _lower_end(curves)
        axes.set_ylim(low, 1 + 0.03 * (1 - low))
        below = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, -0.14),
            "ncols": 2,
        }  # the curves have the panel to themselves
        axes.legend(frameon=False, labelcolor=INK, title="at the end", alignment="left", **below)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return figure
