"""Error vectors of equilibrium propagation beside exact ones, while training goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdeq_ep import EquilibriumPropagation, get_backward, use_backward
from torchdeq_ep.errors import EPError, InvalidOptionError, MeasurementSkippedWarning
from torchdeq_ep.extend import Capture, Equilibrium, Mode, Reference, check_count, cosine, deqs_of, left_as_found
from torchdeq_ep.jacobian import measure_symmetry
from torchdeq_ep_lightning.callbacks.cutting import UncuttableError, first_samples
from torchdeq_ep_lightning.callbacks.lookup import named, rule_of
from torchdeq_ep_lightning.callbacks.means import Measuring
from torchdeq_ep_lightning.callbacks.per_sample import PerSample
from torchdeq_ep_lightning.flavour import LightningModule, Trainer


class AlignmentMonitor(Measuring):
    """Compare error vectors of equilibrium propagation with exact ones, every so many steps, on a few samples.

    After the step, `training_step` is called once more on the first rows of the batch; what it logs is dropped, and
    the module is as before: gradients, buffers, every attribute of it and of what it contains (metrics and their
    counts, lists, counters, generators), and the random state. A measurement never ends a training: a batch of which
    nobody can tell the samples, such as that of a graph, and a measurement that fails are left out, with one warning.
    Logged under `alignment/`, with the DEQ's name in front of the measure if there are several: `cosine` of the two
    error vectors, `symmetry` of `J M` (1 is symmetric), `residual` of the free phase; and the cosine of each part of
    the state that `parts` names.

    Args:
        every: Steps between two measurements; 0 for none.
        samples: Rows of the batch.
        backward: Spec of the mode to compare; by default the one that each DEQ is trained with, or `ep` if that is
            exact.
        metric: Dotted path of a metric in the LightningModule, for the symmetry, and for a mode that is given by
            `backward` or by default. Without it the symmetry is that with the metric of the mode.
        parts: Dotted path of a method of the LightningModule without arguments that returns slices of the state's
            second dimension by name.
        probes: Gaussian probes of the symmetry.
        cut: For batches that are not rows of samples: a function from a batch and a number of samples to a smaller
            batch, or the same batch; or the dotted path of such a method in the LightningModule.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> monitor = AlignmentMonitor(every=100, samples=4)
    """

    def __init__(
        self,
        every: int = 100,
        samples: int = 8,
        backward: str | None = None,
        metric: str | None = None,
        parts: str | None = None,
        probes: int = 20,
        cut: str | Callable[[Any, int], Any] | None = None,
    ) -> None:
        check_count("every", every, 0)
        check_count("samples", samples)
        check_count("probes", probes)
        if backward is not None:
            get_backward(backward)
        super().__init__()
        self.every, self.samples, self.backward, self.probes = every, samples, backward, probes
        self.metric, self.parts, self.cut = metric, parts, cut
        self._has_warned = False
        self.last: dict[str, float] = {}
        """The latest measurements."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deqs_of(pl_module)
        named(pl_module, self.metric)
        named(pl_module, self.parts)
        self._cutter(pl_module)
        if self.every and not pl_module.automatic_optimization:
            raise InvalidOptionError(
                f"AlignmentMonitor calls training_step, and that of {type(pl_module).__name__} steps its optimisers by "
                "itself (automatic_optimization=False): set every=0."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every or batch_idx % self.every:
            return
        try:
            few = self._cutter(pl_module)(batch, self.samples)
            with trainer.precision_plugin.train_step_context():
                self.last = self._measure(pl_module, few, batch_idx)
        except UncuttableError as error:
            self._skip(
                f"of a batch of {type(batch).__name__}, {error}. Give AlignmentMonitor(cut=...) a function that cuts it"
            )
            return
        except Exception as error:  # the training of a user is worth more than a measurement
            self._skip(f"it failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=trainer.global_step)
        self._means.add(self.last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.end_epoch(pl_module)

    def _cutter(self, pl_module: LightningModule) -> Callable[[Any, int], Any]:
        if isinstance(self.cut, str):
            return cast(Callable[[Any, int], Any], named(pl_module, self.cut))
        return self.cut or first_samples

    def _skip(self, reason: str) -> None:
        if not self._has_warned:
            warnings.warn(
                f"AlignmentMonitor leaves out a measurement, and the training goes on: {reason.rstrip('.')}. It is not "
                "said again for this run.",
                MeasurementSkippedWarning,
                stacklevel=2,
            )
        self._has_warned = True

    def _measure(self, pl_module: LightningModule, few: Any, batch_idx: int) -> dict[str, float]:
        deqs = deqs_of(pl_module)
        metric = named(pl_module, self.metric)
        references = [Reference() for _ in deqs]
        modes = [self._mode(deq, metric) for deq in deqs]
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        handles = []
        try:
            for deq, reference in zip(deqs, references, strict=True):
                handles.append(use_backward(deq, reference))
            with left_as_found(pl_module), torch.enable_grad(), _Silenced(pl_module), warnings.catch_warnings():
                # torch on operations that vmap has to loop over: nothing a user could change for a measurement.
                warnings.filterwarnings("ignore", "There is a performance drop")
                returned = pl_module.training_step(few, batch_idx)
                loss = returned["loss"] if isinstance(returned, Mapping) else returned
                torch.autograd.grad(cast(Tensor, loss), trained, allow_unused=True)
            names = {deq: name for name, deq in pl_module.named_modules() if deq in deqs}
            measured: dict[str, float] = {}
            for deq, reference, mode in zip(deqs, references, modes, strict=True):
                prefix = f"alignment/{names[deq]}/" if len(deqs) > 1 else "alignment/"
                for capture in reference.captures[:1]:
                    values = self._compare(capture, mode, metric, pl_module)
                    measured |= {f"{prefix}{name}": value for name, value in values.items()}
        finally:
            for handle in handles:
                handle.remove()
        return measured

    def _mode(self, deq: nn.Module, metric: Any) -> Mode:
        rule = rule_of(deq)
        if self.backward is None and rule is not None and isinstance(rule.mode, (EquilibriumPropagation, PerSample)):
            return rule.mode
        options = {} if metric is None else {"metric": metric}
        return cast(Mode, get_backward(self.backward or "ep", **options))

    def _compare(self, capture: Capture, mode: Mode, metric: Any, pl_module: LightningModule) -> dict[str, float]:
        equilibrium = capture.equilibrium
        exact = capture.exact
        with capture.autocast.restored(True):
            values = {"residual": equilibrium.residual, "symmetry": self._symmetry(equilibrium, mode, metric)}
            try:
                estimate = mode.solve(equilibrium)[0].to(exact)
            except EPError:  # a nudge that diverges is aligned with nothing
                return values | {"cosine": math.nan}
        values["cosine"] = cosine(estimate, exact)
        for name, part in (named(pl_module, self.parts)() if self.parts else {}).items():
            values[f"cosine/{name}"] = cosine(estimate[:, part], exact[:, part])
        return values

    def _symmetry(self, equilibrium: Equilibrium, mode: Mode, metric: Any) -> float:
        f, z = equilibrium.f, equilibrium.z
        inner = mode.mode if isinstance(mode, PerSample) else mode
        metric = metric or getattr(inner, "metric", None)
        generator = torch.Generator(z.device).manual_seed(0)
        return measure_symmetry(f, z, self.probes, metric=metric, generator=generator).symmetry


class _Silenced:
    """A context in which `self.log` of a LightningModule does nothing."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._namespace = vars(pl_module)

    def __enter__(self) -> None:
        self._before = self._namespace.get("log")
        self._namespace["log"] = lambda *_, **__: None

    def __exit__(self, *_: object) -> None:
        del self._namespace["log"]
        if self._before is not None:
            self._namespace["log"] = self._before
