"""The callbacks on a LightningModule that knows nothing of them."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest
import torch
import torchdeq
from lightning_problems import TransformerTask, fit, sequences
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.loggers import CSVLogger
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, NoDEQError, UnknownBackwardError
from torchdeq_ep.extend import EquilibriumRule
from torchdeq_ep_lightning import AlignmentMonitor, Homeostasis, NudgeStats, SwapBackward
from torchdeq_ep_lightning.callbacks import PerSample, loss_scale

pytestmark = [
    pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap of torch's attention
]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trained(tmp_path, *callbacks, **options) -> TransformerTask:
    torch.manual_seed(0)
    module = TransformerTask()
    fit(module, tmp_path, *callbacks, **options)
    return module


class Modes(Callback):
    """Which mode is in force at every batch."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        rule = pl_module.deq.produce_grad[-1]
        self.seen.append(rule.mode if isinstance(rule, EquilibriumRule) else None)


def test_what_becomes_of_a_phase_that_does_not_converge_is_an_option():
    callback = SwapBackward("ep:beta=0.5", on_divergence="accept", max_iter=20)
    mode = callback._mode("ep:beta=0.5", None, lambda: 1.0)
    assert (mode.on_divergence, mode.max_iter) == ("accept", 20)
    assert callback._mode("ift", None, lambda: 1.0).on_divergence == "accept"
    assert callback._mode("ep:on_divergence=raise", None, lambda: 1.0).on_divergence == "raise"
    assert callback._mode("ep:on_divergence=shrink", None, lambda: 1.0).on_divergence == "shrink"
    assert callback._mode(tep.EquilibriumPropagation(), None, lambda: 1.0).on_divergence == "shrink"
    assert callback._mode("one-step", None, lambda: 1.0) == tep.get_backward("one-step")  # has no such option
    with pytest.raises(InvalidOptionError, match="on_divergence"):
        SwapBackward("ep", on_divergence="ignore")


def test_swap_by_epoch_and_step(tmp_path):
    modes = Modes()
    trained(tmp_path, SwapBackward({0: "ift", 1: "ep:beta=0.01"}), modes, max_epochs=2)
    assert modes.seen == [tep.get_backward("ift")] * 4 + [tep.get_backward("ep:beta=0.01")] * 4
    modes = Modes()
    trained(tmp_path, SwapBackward({0: "aep", 3: "ift"}, by="step"), modes)
    assert modes.seen == [tep.get_backward("aep")] * 3 + [tep.get_backward("ift")]


def test_swap_leaves_the_module_as_it_was(tmp_path):
    module = TransformerTask()
    before = module.deq.produce_grad
    fit(module, tmp_path, SwapBackward("aep"), Homeostasis(0.1), NudgeStats(), AlignmentMonitor(every=1))
    assert module.deq.produce_grad is before
    assert not module.deq._forward_hooks
    assert not module.deq._forward_pre_hooks
    assert "log" not in vars(module)


def test_modes_that_are_exact_train_alike(tmp_path):
    plain = trained(tmp_path)
    for spec in ("ift", "aep"):
        swapped = trained(tmp_path, SwapBackward(spec))
        assert torch.allclose(weights(swapped), weights(plain), atol=1e-3)
        assert swapped.losses == pytest.approx(plain.losses, rel=1e-2)


def test_options_reach_only_modes_that_have_them():
    swap = SwapBackward({0: "ift", 1: "ep"}, max_iter=7, tol=0.25)
    module = SimpleNamespace(metric=torch.ones_like)
    ift, ep = (swap._mode(spec, module.metric, lambda: 1.0) for spec in ("ift", "ep"))
    assert ift == tep.ImplicitDifferentiation(max_iter=7, tol=0.25)
    assert ep == tep.EquilibriumPropagation(metric=module.metric, max_iter=7, tol=0.25)


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
def test_amplitude_per_sample_is_that_of_each_sample_alone():
    """Samples do not couple: nudging a batch by its mean loss is nudging each by its own."""
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64) / 6
    drive, target = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)

    def equilibrium(rows):
        f = lambda z: torch.tanh(z @ weight.T + drive[rows])  # noqa: E731
        z = torch.zeros_like(drive[rows])
        for _ in range(300):
            z = f(z)
        return f, z, (z - target[rows]) / len(z)

    mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(0.3), tol=1e-12)
    for scale in (1.0, 64.0):  # a GradScaler multiplies the cotangent, not the nudge
        f, z, g = equilibrium(slice(None))
        together = PerSample(mode, lambda: scale)(f, z, scale * g) / scale  # noqa: B023
        for row in range(5):
            f, z, g = equilibrium(slice(row, row + 1))
            alone = PerSample(mode, lambda: 1.0)(f, z, g) / 5
            assert torch.allclose(together[row], alone[0], atol=1e-10)
    other = PerSample(mode, lambda: 2.0)(*equilibrium(slice(None)))
    assert not torch.allclose(other, together, atol=1e-4)  # the amplitude does matter here


@pytest.mark.parametrize(
    ("form", "samples"),
    [
        (lambda z: z, 4),
        (lambda z: z[:, 0], 4),
        (lambda z: z[:1], 1),
        (lambda z: z[0, 0], 1),
        (lambda z: (z, z[:, 0]), 4),
        (lambda z: [z, z.reshape(4, 2, 3)], 4),
        (lambda z: z + 1j * z.flip(1), 4),
        (lambda z: [z[:1], z[:1]], None),
        (lambda z: (z, z[:2]), None),
        (lambda z: z[:1] + 1j, None),
    ],
)
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
def test_samples_are_counted_in_every_form_of_a_state_or_refused(form, samples):
    """The nudge is `beta` times their number, whatever the number of entries."""
    state = form(torch.randn(4, 6, dtype=torch.float64))
    f = lambda *z: [torch.tanh(t) / 2 + 0.3 for t in z] if len(z) > 1 else torch.tanh(z[0]) / 2 + 0.3  # noqa: E731
    for _ in range(200):
        state = f(*state) if isinstance(state, (tuple, list)) else f(state)
    mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(0.05), tol=1e-12)
    if samples is None:
        with pytest.raises(InvalidOptionError, match="each tensor has one row"):
            PerSample(mode, lambda: 1.0)(f, state, state)
        return
    found = PerSample(mode, lambda: 1.0)(f, state, state)
    absolute = tep.EquilibriumPropagation(tep.Stencil.one_sided(0.05 * samples), scale="absolute", tol=1e-12)
    expected = absolute(f, state, state)
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: SwapBackward("hepp"), UnknownBackwardError, "hepp"),
        (lambda: SwapBackward({1: "ep"}), InvalidOptionError, "0 among them"),
        (lambda: SwapBackward("ep", by="batch"), InvalidOptionError, "batch"),
        (lambda: SwapBackward("ep", amplitude="per-sample"), InvalidOptionError, "beta"),
        (lambda: Homeostasis(-1.0), InvalidOptionError, "weight"),
        (lambda: Homeostasis(every=0), InvalidOptionError, "every"),
        (lambda: AlignmentMonitor(samples=0), InvalidOptionError, "samples"),
    ],
)
def test_bad_options_are_refused(make, error, word):
    with pytest.raises(error, match=word):
        make()


def test_a_module_without_a_deq_is_refused(tmp_path):
    module = TransformerTask()
    del module.deq
    with pytest.raises(NoDEQError):
        fit(module, tmp_path, SwapBackward("ep"))
    with pytest.raises(InvalidOptionError, match="no_such_thing"):
        fit(TransformerTask(), tmp_path, SwapBackward("ep", metric="no_such_thing"))


def test_homeostasis_is_the_penalty_added_to_the_loss(tmp_path):
    """Also where Lightning divides the loss by the number of accumulated batches."""

    class ByHand(TransformerTask):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.homeostasis.penalty()

        def on_train_batch_start(self, batch, batch_idx):
            key = callback_seed(self.trainer, batch_idx)
            self.homeostasis = tep.register_homeostasis(self, 2.0, 3, seed=key)

        def on_train_batch_end(self, *_):
            self.homeostasis.remove()

    def callback_seed(trainer, batch_idx):
        callback = Homeostasis(2.0, probes=3, enabled=False)
        callback.on_train_batch_start(trainer, trainer.lightning_module, None, batch_idx)
        return callback._seed(trainer)

    for accumulate in (1, 2):
        callback = trained(tmp_path, Homeostasis(2.0, probes=3), accumulate_grad_batches=accumulate)
        torch.manual_seed(0)
        by_hand = ByHand()
        fit(by_hand, tmp_path, accumulate_grad_batches=accumulate)
        without = trained(tmp_path, accumulate_grad_batches=accumulate)
        assert torch.allclose(weights(callback), weights(by_hand), atol=1e-6)
        assert not torch.allclose(weights(callback), weights(without), atol=1e-4)


class LinearTask(LightningModule):
    """A linear map, whose Jacobian is its weight, and a loss without a gradient: only descent moves the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(4, 4))
        self.deq = torchdeq.get_deq(ift=True)

    def training_step(self, batch, batch_idx):
        x = batch[0][:, 0]
        (z,), _ = self.deq(lambda z: z @ self.weight.T + x, torch.zeros_like(x))
        return 0 * z.sum()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.1)
        halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving, "interval": "step"}}


@pytest.mark.parametrize(("accumulate", "rates"), [(1, (1, 0.5, 0.25, 0.125)), (2, (1, 0.5))])
def test_homeostasis_by_a_descent_of_its_own(tmp_path, accumulate, rates):
    """A whole step would make the weight symmetric; the share follows the schedule."""
    module = LinearTask()
    weight = module.weight.detach().clone()
    for rate in rates:
        weight -= 0.05 * rate * (weight - weight.T) / 2
    start = module.weight.detach().clone()
    fit(module, tmp_path, Homeostasis(0.05, descent=True, probes=5000), accumulate_grad_batches=accumulate)
    assert torch.allclose(module.weight, weight, atol=0.05 * float((weight - start).abs().max()))


class ScheduledTask(LinearTask):
    """The same under another optimiser and schedule."""

    def __init__(self, optimizer, schedule):
        super().__init__()
        self.make = optimizer, schedule

    def configure_optimizers(self):
        optimizer = self.make[0](self.parameters())
        schedule = self.make[1]
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


SCHEDULES = {
    "one cycle, from a 25th of its peak": (
        lambda p: torch.optim.SGD(p, 0.1),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5, cycle_momentum=False),
        0.1,
    ),
    "cyclic, whose peak is known once it was there": (
        lambda p: torch.optim.SGD(p, 0.1),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2, step_size_up=2, cycle_momentum=False),
        None,
    ),
    "warm-up from 0": (
        lambda p: torch.optim.SGD(p, 0.1),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 3),
        0.1,
    ),
    "a first group that does not move": (
        lambda p: torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": 0.0}, {"params": p}], 0.1),
        None,
        0.1,
    ),
    "no group that moves": (lambda p: torch.optim.SGD(p, 0.0), None, 1.0),
    "several evaluations of the loss for a step": (
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4, tolerance_grad=-1.0, tolerance_change=-1.0),
        None,
        0.1,
    ),
}


class Rates(Callback):
    """The rate of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[-1]["lr"])


@pytest.mark.parametrize(("optimizer", "schedule", "peak"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_descent_follows_the_schedule_and_moves_once_a_step(tmp_path, optimizer, schedule, peak):
    module, rates = ScheduledTask(optimizer, schedule), Rates()
    start = module.weight.detach().clone()
    fit(module, tmp_path, Homeostasis(0.05, descent=True, probes=5000), rates)
    expected = start.clone()
    assert len(rates.seen) == 4
    for k, rate in enumerate(rates.seen, start=1):
        expected -= 0.05 * (rate / (peak or max(rates.seen[:k]))) * (expected - expected.T) / 2
    error = float((module.weight.detach() - expected).abs().max())
    assert error <= 0.05 * float((expected - start).abs().max())


class Resumed(Callback):
    """What the automatic weight is at the end."""

    def on_train_end(self, trainer, pl_module):
        (self.controller,) = trainer.callbacks[0]._registered.state_dict().values()


@pytest.mark.parametrize("descent", [False, True])
def test_automatic_homeostasis_goes_on_where_a_run_was_stopped(tmp_path, descent):
    def callbacks():
        return Homeostasis("auto", descent, estimator="error-vector"), SwapBackward("ep"), Resumed()

    torch.manual_seed(0)
    whole = callbacks()
    fit(TransformerTask(), tmp_path, *whole, max_epochs=4)
    torch.manual_seed(0)
    module, first, then = TransformerTask(), callbacks(), callbacks()
    fit(module, tmp_path, *first, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(module, tmp_path, *then, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert whole[2].controller == then[2].controller
    assert whole[2].controller["passes"] == 2 * first[2].controller["passes"]
    assert whole[2].controller["weight"] not in (5.0, 0.1)  # where it began


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InvalidOptionError, match="error-vector"):
        Homeostasis("auto")
    with pytest.raises(InvalidOptionError, match="every=1"):
        Homeostasis("auto", estimator="error-vector", every=2)
    with pytest.raises(InvalidOptionError, match="share"):
        Homeostasis(20.0, descent=True)


class SaveWeight(Callback):
    """Each process saves the weight it ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.weight.detach().clone(), self.folder / f"{trainer.global_rank}.pt")


def test_the_descents_of_two_processes_are_one(tmp_path):
    """Each draws probes of its own; both take the mean of the two steps."""
    module = LinearTask()
    start = module.weight.detach().clone()
    expected = start.clone()
    for rate in (1, 0.5):
        expected -= 0.05 * rate * (expected - expected.T) / 2
    descent = Homeostasis(0.05, descent=True, probes=5000)
    fit(module, tmp_path, descent, SaveWeight(tmp_path), devices=2, strategy="ddp_fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other)
    assert torch.allclose(one, expected, atol=0.05 * float((expected - start).abs().max()))


def test_homeostasis_schedule_and_log(tmp_path):
    module = TransformerTask()
    trainer = fit(module, tmp_path, Homeostasis({0: 0.0, 1: 3.0}), max_epochs=2)
    assert trainer.callback_metrics["homeostasis/weighted"] > 0
    measured = trainer.callback_metrics
    assert measured["homeostasis/weighted"] == pytest.approx(3.0 * float(measured["homeostasis/penalty"]), rel=1e-4)
    unchanged = trained(tmp_path, Homeostasis(0.0))
    assert torch.equal(weights(unchanged), weights(trained(tmp_path)))


def test_homeostasis_makes_the_jacobian_more_symmetric(tmp_path):
    symmetries = []
    for weight in (0.0, 30.0):
        torch.manual_seed(0)
        trainer = fit(TransformerTask(), tmp_path, Homeostasis(weight), max_epochs=5)
        symmetries.append(float(trainer.callback_metrics["homeostasis/symmetry"]))
    assert symmetries[1] > symmetries[0] + 0.02


def test_nudge_stats_are_those_of_the_reports(tmp_path):
    seen = []

    class Reporting(TransformerTask):
        def forward(self, x):
            drive = self.read_in(x)
            f = lambda z: 0.2 * torch.tanh(self.block(z)) + drive  # noqa: E731
            (z,), _ = self.deq(
                f, torch.zeros_like(drive), backward_writer=lambda statistics: seen.append(statistics["report"])
            )
            return self.read_out(z.mean(1))

    trainer = fit(Reporting(), tmp_path, SwapBackward("ep:beta=0.01"), NudgeStats())
    measured = trainer.callback_metrics
    assert len(seen) == 4  # a writer of the user's own is still called
    assert float(measured["nudge/iterations"]) == pytest.approx(sum(r.iterations for r in seen) / 4)
    assert float(measured["nudge/beta"]) == pytest.approx(0.01)
    assert float(measured["nudge/unconverged"]) == sum(not r.converged for r in seen) / 4
    assert float(measured["nudge/shrunk"]) == float(measured["nudge/fallback"]) == 0.0
    assert 0 < float(measured["free/residual"]) < 1e-3
    plain = fit(TransformerTask(), tmp_path, NudgeStats()).callback_metrics
    assert float(plain["nudge/iterations"]) > 0
    assert "nudge/beta" not in plain


def test_means_of_the_last_steps_and_of_the_epoch(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    options = {"logger": logger, "log_every_n_steps": 2}
    trainer = fit(TransformerTask(), tmp_path, SwapBackward("ep:beta=0.01"), NudgeStats(), **options)
    rows = list(csv.DictReader((tmp_path / "log" / "metrics.csv").read_text().splitlines()))
    steps = [float(row["nudge/calls_step"]) for row in rows if row.get("nudge/calls_step")]
    assert len(steps) == 2  # of four steps
    assert float(trainer.callback_metrics["nudge/calls"]) == pytest.approx(sum(steps) / 2)


def test_alignment_is_that_of_the_dense_jacobian(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    monitor = AlignmentMonitor(every=2, samples=2)
    module = TransformerTask()
    fit(module, tmp_path, SwapBackward("ep-infinitesimal"), monitor, logger=logger, limit_train_batches=3)
    assert set(monitor.last) == {f"alignment/{name}" for name in ("cosine", "symmetry", "residual")}
    # The third and last measurement was taken after the last step, on the first rows of its batch.
    x, y = (tensor[:2] for tensor in list(sequences())[2])
    captured = []

    class Keep:
        def __call__(self, f, z, g):
            captured.append((f, z, g))
            return g

    with tep.use_backward(module, Keep()):
        nn.functional.cross_entropy(module(x), y).backward()
    f, z, g = captured[0]
    jacobian = tep.jacobian.dense_jacobian(f, z).double()
    eye = torch.eye(len(jacobian), dtype=torch.float64)
    exact = torch.linalg.solve(eye - jacobian.T, g.flatten().double())
    ep = torch.linalg.solve(eye - jacobian, g.flatten().double())
    cosine = float(nn.functional.cosine_similarity(exact, ep, dim=0))
    assert cosine < 0.999
    assert monitor.last["alignment/cosine"] == pytest.approx(cosine, abs=1e-3)
    rows = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    assert "alignment/cosine" in rows[0]


def test_symmetry_is_that_with_the_metric_of_the_monitor(tmp_path):
    module = TransformerTask()
    module.weighed = lambda z: torch.logspace(-2, 2, z[0].numel()).view_as(z[0]).expand_as(z)
    monitor = AlignmentMonitor(metric="weighed", samples=1, probes=400)
    fit(module, tmp_path, SwapBackward("ep:beta=0.01"), monitor, limit_train_batches=1)
    captured = []
    with tep.use_backward(module, lambda f, z, g: captured.append((f, z)) or g):
        module(next(iter(sequences()))[0][:1]).sum().backward()
    product = tep.jacobian.dense_jacobian(*captured[0]) * module.weighed(captured[0][1]).flatten()
    symmetric, antisymmetric = (product + product.T).norm(), (product - product.T).norm()
    share = float(symmetric / (symmetric + antisymmetric))
    assert monitor.last["alignment/symmetry"] == pytest.approx(share, abs=0.02)
    assert float(tep.jacobian.symmetry_score(*captured[0], probes=400)) != pytest.approx(share, abs=0.04)


def test_monitoring_changes_nothing(tmp_path):
    watched = trained(tmp_path, SwapBackward("ep"), NudgeStats(), AlignmentMonitor(every=1), max_epochs=2)
    alone = trained(tmp_path, SwapBackward("ep"), max_epochs=2)
    assert torch.equal(weights(watched), weights(alone))


def test_loss_scale_follows_accumulation_and_scaler():
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=4)
    assert loss_scale(trainer) == 256.0
    trainer.precision_plugin = SimpleNamespace()
    assert loss_scale(trainer) == 0.25


def test_manual_optimisation_is_refused_by_the_monitor(tmp_path):
    module = TransformerTask()
    module.automatic_optimization = False
    with pytest.raises(InvalidOptionError, match="every=0"):
        fit(module, tmp_path, AlignmentMonitor())


def test_with_the_distribution_called_lightning(tmp_path):
    """Its classes are copies of those of pytorch-lightning: callbacks work by their methods, not their base class."""
    pytest.importorskip("lightning.pytorch")
    import lightning.pytorch as other

    namespace = {
        name: value
        for name, value in vars(TransformerTask).items()
        if name in ("forward", "training_step", "configure_optimizers")
    }

    def init(self):
        other.LightningModule.__init__(self)
        donor = TransformerTask()
        for name, child in donor.named_children():
            setattr(self, name, child)
        self.losses = []

    task = type("Task", (other.LightningModule,), namespace | {"__init__": init})()
    stats = NudgeStats()
    trainer = other.Trainer(
        max_epochs=1,
        callbacks=[SwapBackward("ep:beta=0.01"), Homeostasis(0.1), stats, AlignmentMonitor(every=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, sequences())
    assert math.isclose(float(trainer.callback_metrics["nudge/beta"]), 0.01, rel_tol=1e-5)
    assert "alignment/cosine" in trainer.callback_metrics
