"""`diagnose` finds the causes that were planted, each by itself."""

import functools
import json
import math
import time

import pytest
import torch
import torchdeq
from problems import contraction
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, NoDEQError
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.measuring import splitting


class Model(nn.Module):
    """A descent on an energy, plus `skew` times an antisymmetric field: `skew` alone makes the Jacobian asymmetric."""

    def __init__(self, skew=0.0, f_tol=1e-13, n=6):
        super().__init__()
        self.encoder, self.readout = nn.Linear(3, n), nn.Linear(n, 2)
        self.weight = nn.Parameter(contraction(n, 0, 0.7))
        matrix = contraction(n, 1, 1.0)
        self.register_buffer("field", skew * (matrix - matrix.T))
        self.deq = torchdeq.get_deq(f_tol=f_tol, f_max_iter=500)
        self.double()

    def forward(self, inputs):
        x = self.encoder(inputs)

        def f(z):
            return 0.5 * torch.tanh(z @ self.weight.T) @ self.weight + z @ self.field.T + x

        return self.readout(self.deq(f, torch.zeros_like(x))[0][-1])


BATCH = (
    torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
)


@functools.cache
def _parts(backward="ep:beta=0.2", **options):
    torch.manual_seed(0)
    (layer,) = tep.diagnose(Model(**options), BATCH, nn.functional.mse_loss, backward).layers
    return layer


def _sizes(layer):
    parts = layer.error_vector
    return parts.finite_nudge.relative, parts.asymmetry.relative, parts.convergence.relative


def test_a_larger_nudge_moves_only_the_finite_part():
    small, large = (
        _sizes(_parts("ep:beta=0.1,tol=1e-12", skew=0.05)),
        _sizes(_parts("ep:beta=0.2,tol=1e-12", skew=0.05)),
    )
    assert large[0] / small[0] == pytest.approx(4, rel=0.1)
    assert large[1] == pytest.approx(small[1], rel=1e-6)
    assert max(small[2], large[2]) < 1e-9


def test_an_antisymmetric_field_moves_only_the_asymmetry():
    none, little, more = (_sizes(_parts(skew=skew)) for skew in (0.0, 0.01, 0.02))
    assert none[1] < 1e-9
    assert more[1] / little[1] == pytest.approx(2, rel=0.1)
    assert more[0] == pytest.approx(none[0], rel=0.1)


def test_a_loose_tolerance_moves_only_the_convergence():
    tight, loose = _sizes(_parts(skew=0.05)), _sizes(_parts("ep:beta=0.2,tol=1e-2", skew=0.05, f_tol=1e-1))
    assert loose[2] > 1e3 * tight[2]
    assert loose[2] > 1e-4
    assert loose[0] == pytest.approx(tight[0], rel=0.1)
    assert loose[1] == pytest.approx(tight[1], rel=0.1)


def test_parts_of_the_gradient_and_of_the_error_vector_are_consistent():
    layer = _parts(skew=0.1)
    assert set(layer.parameters) == {"encoder.weight", "encoder.bias", "weight"}  # the read-out is not reached
    for parts in (layer.error_vector, *layer.parameters.values()):
        together = parts.finite_nudge.relative + parts.asymmetry.relative + parts.convergence.relative
        assert 0 < parts.total.relative <= together * (1 + 1e-9)
        assert -1 <= parts.total.cosine <= 1
    assert layer.error_vector.total.relative == pytest.approx(layer.error_vector.asymmetry.relative, rel=0.2)


@pytest.mark.parametrize(
    ("backward", "options", "word"),
    [
        ("ep-one-sided:beta=0.8", {}, "size of the nudge"),
        ("ep", {"skew": 0.2}, "asymmetry of the Jacobian"),
        ("ep", {}, "nothing to mend"),
    ],
)
def test_advice_names_the_largest_cause(backward, options, word):
    assert word in _parts(backward, **options).advice


def test_the_asymmetric_correction_leaves_nothing_to_mend(monkeypatch):
    monkeypatch.setattr(splitting, "AMPLITUDES", (1e-3,))  # nothing here depends on the sweep, which is slow
    layer = _parts.__wrapped__("aep", skew=0.2)
    assert "nothing to mend" in layer.advice
    assert layer.symmetry.symmetry < 0.9


def test_the_sweep_approaches_the_floor_from_below_and_the_best_amplitude_is_on_it():
    layer = _parts(skew=0.1)
    assert layer.limit_alignment < 0.9999
    total = [parts.total.cosine for parts in layer.parameters.values()]
    assert min(total) - 1e-4 < layer.limit_alignment < max(total) + 1e-4  # it is that of the whole gradient
    for cosines in layer.sweep.values():
        assert min(abs(cosine - layer.limit_alignment) for cosine in cosines if math.isfinite(cosine)) < 1e-6
    assert 1e-4 <= layer.best_beta < 0.1


def test_the_measures_are_those_of_the_dense_jacobian():
    model, seen = Model(skew=0.1), []
    with tep.register_fixed_point_hook(model, lambda f, z, deq: seen.append((f, z))):
        (layer,) = tep.diagnose(model, BATCH, nn.functional.mse_loss).layers
    jacobian = dense_jacobian(*seen[0])
    symmetric, antisymmetric = (float((jacobian + sign * jacobian.T).norm() / 2) for sign in (1, -1))
    assert layer.spectral_radius == pytest.approx(float(torch.linalg.eigvals(jacobian).abs().max()), rel=1e-3)
    found = layer.symmetry
    assert abs(found.symmetry - symmetric / (symmetric + antisymmetric)) < 4 * found.symmetry_se < 0.1
    assert abs(found.asymmetry - antisymmetric / float(jacobian.norm())) < 4 * found.asymmetry_se < 0.1


def test_symmetry_is_that_of_the_product_with_the_metric_of_the_mode():
    diagonal = torch.tensor([1.0, 10.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    mode = tep.EquilibriumPropagation(metric=lambda z: diagonal.expand_as(z))
    with_it, without = _parts(mode), _parts()
    assert without.symmetry.symmetry == pytest.approx(1.0, abs=1e-9)
    assert with_it.symmetry.symmetry < 0.9
    assert with_it.spectral_radius == pytest.approx(without.spectral_radius, rel=1e-6)


class ForwardOnly(torch.autograd.Function):
    """An operation with forward mode whose backward cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.sin(), z.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def jvp(ctx, tangent):
        (slope,) = ctx.saved_tensors
        return slope * tangent, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        (slope,) = ctx.saved_tensors
        return slope * gradient


def test_a_symmetry_that_cannot_be_measured_hides_nothing_else(monkeypatch):
    monkeypatch.setattr(splitting, "AMPLITUDES", (1e-3,))

    class Once(Model):
        def forward(self, inputs):
            x = self.encoder(inputs)
            return self.deq(lambda z: ForwardOnly.apply(z @ self.weight.T + x)[0], torch.zeros_like(x))[0][-1]

    batch = BATCH[0], torch.zeros(5, 6, dtype=torch.float64)
    diagnosis = tep.diagnose(Once(), batch, nn.functional.mse_loss)
    (layer,) = diagnosis.layers
    assert layer.symmetry is None
    assert 0 < layer.spectral_radius < 1
    assert "| no products | no products |" in diagnosis.to_markdown()
    assert any(note.startswith("no symmetry: JacobianProductError") for note in layer.notes)


def test_each_of_several_deqs_is_diagnosed_once():
    class Two(Model):
        def __init__(self):
            super().__init__()
            self.second = torchdeq.get_deq(f_tol=1e-13, f_max_iter=500)
            self.symmetric = nn.Parameter(contraction(6, 2, 0.5, symmetric=True))

        def forward(self, inputs):
            x = self.encoder(inputs)
            h = self.deq(lambda z: torch.tanh(z @ self.weight.T + x), torch.zeros_like(x))[0][-1]
            return self.second(lambda z: z @ self.symmetric + h, torch.zeros_like(x))[0][-1]

    diagnosis = tep.diagnose(Two(), (BATCH[0], torch.zeros(5, 6, dtype=torch.float64)), nn.functional.mse_loss)
    second, first = diagnosis.layers
    assert (second.name, first.name) == ("second", "deq")
    assert set(first.parameters) == {"encoder.weight", "encoder.bias", "weight"}
    assert set(second.parameters) == {*first.parameters, "symmetric"}
    assert second.symmetry.symmetry == pytest.approx(1.0, abs=1e-9)
    assert first.symmetry.symmetry < 0.8
    assert diagnosis.advice[0].startswith("second: The error vector is within")
    assert diagnosis.advice[1].startswith("deq: Most of the error is the asymmetry")


def test_each_deq_has_its_own_name_whatever_the_order_of_registration(monkeypatch):
    monkeypatch.setattr(splitting, "STENCILS", {})

    class Crossed(Model):
        """`late` is registered first and called last; `early` is called twice."""

        def __init__(self):
            super().__init__()
            del self.deq
            self.late, self.early = torchdeq.get_deq(f_tol=1e-12), torchdeq.get_deq(f_tol=1e-12)

        def forward(self, inputs):
            x = self.encoder(inputs)
            for _ in range(2):
                x = self.early(lambda z, x=x: 0.2 * torch.tanh(z @ self.weight.T) + x, torch.zeros_like(x))[0][-1]
            return self.late(lambda z: 0.3 * z + x, torch.zeros_like(x))[0][-1]

    diagnosis = tep.diagnose(Crossed(), (BATCH[0], torch.zeros(5, 6, dtype=torch.float64)), nn.functional.mse_loss)
    assert [layer.name for layer in diagnosis.layers] == ["late", "early (call 2 of 2)", "early (call 1 of 2)"]
    assert diagnosis.layers[0].spectral_radius == pytest.approx(0.3, rel=1e-6)
    assert diagnosis.layers[1].spectral_radius < 0.2


def _small(monkeypatch, loss_fn=nn.functional.mse_loss, model=None, backward="ep", **options):
    monkeypatch.setattr(splitting, "AMPLITUDES", (1e-3, 1e-1))
    torch.manual_seed(0)
    diagnosis = tep.diagnose(model or Model(**options), BATCH, loss_fn, backward)
    assert len(diagnosis.to_markdown().splitlines()) >= 7 + len(diagnosis.layers)
    json.dumps(diagnosis.to_dict(), allow_nan=False)
    return diagnosis.layers[0]


def test_a_cotangent_that_is_not_finite_ends_in_a_table(monkeypatch):
    layer = _small(monkeypatch, lambda outputs, targets: (outputs * torch.inf).sum())
    assert layer.error_vector.total.reason == "no estimate"
    assert layer.error_vector.asymmetry.reason == "no limit"
    assert math.isnan(layer.exact_residual)
    assert layer.spectral_radius < 1  # which does not depend on the cotangent
    assert layer.advice.startswith("There is no exact adjoint (NonFiniteError")
    assert any(note.startswith("no estimate: NonFiniteError") for note in layer.notes)


def test_a_cotangent_of_zero_ends_in_a_table(monkeypatch):
    layer = _small(monkeypatch, lambda outputs, targets: (0.0 * outputs).sum())
    assert layer.error_vector.total.reason == "exact one is zero"
    assert layer.advice.startswith("The cotangent is zero")


def test_a_free_phase_that_did_not_converge_is_named_first(monkeypatch):
    model = Model(skew=0.2)
    model.deq = torchdeq.get_deq(f_max_iter=1, f_tol=1e-9)
    layer = _small(monkeypatch, model=model)
    assert layer.residual > 1e-2 > 1e-6 > layer.settled_residual
    assert layer.advice.startswith("The free phase stopped at a relative residual of")


def test_no_error_is_advised_on_that_is_itself_not_known(monkeypatch):
    monkeypatch.setattr(splitting.capturing, "LARGEST_DENSE", 4)
    monkeypatch.setattr(splitting, "LARGE", splitting.Effort(3, 1e-4, 3, 1e-3))
    layer = _small(monkeypatch, skew=0.2)
    assert layer.exact_residual > 1e-3
    assert "The exact adjoint is itself not known" in layer.advice
    assert "Most of the error" not in layer.advice
    assert any(note.startswith("the exact adjoint stopped at a relative residual") for note in layer.notes)


def test_a_singular_jacobian_ends_in_a_table(monkeypatch):
    class Identity(Model):
        def forward(self, inputs):
            x = self.encoder(inputs)
            return self.readout(self.deq(lambda z: z + 0.0 * self.weight.sum(), x)[0][-1])

    layer = _small(monkeypatch, model=Identity())
    assert layer.spectral_radius == pytest.approx(1.0)
    assert "I - J is singular" in layer.advice


def test_a_map_that_raises_when_it_is_nudged_ends_in_a_table(monkeypatch):
    class Moody(Model):
        calls = 0

        def forward(self, inputs):
            x = self.encoder(inputs)

            def f(z):
                self.calls += 1
                if self.calls > 40:
                    raise ValueError("enough")
                return 0.5 * torch.tanh(z @ self.weight.T) + x

            return self.readout(self.deq(f, torch.zeros_like(x))[0][-1])

    model = Moody()
    model.deq = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=30, f_tol=1e-13)
    layer = _small(monkeypatch, model=model)
    assert any("ValueError: enough" in note for note in layer.notes)


def test_progress_goes_from_nothing_to_all_of_it():
    seen = []
    torch.manual_seed(0)
    tep.diagnose(Model(), BATCH, nn.functional.mse_loss, on_progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(seen[-1][2] + 1))
    assert {total for *_, total in seen} == {1 + splitting.STEPS}
    assert seen[0][0] == "the equilibria"
    assert ("deq: the exact adjoint", 3, 1 + splitting.STEPS) in seen


@pytest.mark.slow
def test_an_ordinary_trained_model_is_diagnosed_within_a_minute(trained_cnn):
    model, batch = trained_cnn
    start = time.process_time()
    (layer,) = tep.diagnose(model, batch, nn.functional.cross_entropy).layers
    assert time.process_time() - start < 60
    assert layer.exact_residual < 1e-3
    assert math.isfinite(layer.error_vector.total.relative)
    assert layer.spectral_radius > 0.9
    assert layer.symmetry is not None
    # Near a radius of 1 a nudge or two may fail, which ones depends on the machine that trained: each is counted.
    for name in ("one-sided", "symmetric"):
        failed = sum(math.isnan(value) for value in layer.sweep[name])
        told = [note for note in layer.notes if note.startswith(f"{name}: no usable estimate at {failed} of")]
        assert failed < len(layer.sweep[name])
        assert len(told) == (failed > 0)
    assert any(note.startswith("contour-4: NotHolomorphicError") for note in layer.notes)


def test_what_the_mode_warned_about_is_kept():
    assert any("ConvergenceWarning" in note for note in _parts("ep:max_iter=3,tol=1e-8").notes)
    assert not _parts().notes


def test_the_model_is_left_as_it_was_found():
    model = Model(skew=0.1).eval()
    rules, random_state = model.deq.produce_grad, torch.get_rng_state()
    tep.diagnose(model, BATCH, nn.functional.mse_loss)
    assert model.deq.produce_grad is rules
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_forms(tmp_path):
    diagnosis = tep.diagnose(Model(skew=0.1), BATCH, nn.functional.mse_loss)
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["layers"][0]["name"] == "deq"
    table = diagnosis.to_markdown()
    assert "| deq: error vector |" in table
    assert "| encoder.weight |" in table
    assert (
        "| DEQ | adjoint residual | symmetry | asymmetry | spectral radius | free residual | exact residual | beta | "
        "best beta |" in table
    )
    assert table.splitlines()[-1] == diagnosis.layers[0].advice
    diagnosis.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_what_cannot_be_diagnosed():
    with pytest.raises(InvalidOptionError, match="only modes of equilibrium propagation"):
        tep.diagnose(Model(), BATCH, nn.functional.mse_loss, "ift")
    with pytest.raises(NoDEQError):
        tep.diagnose(nn.Linear(3, 2).double(), BATCH, nn.functional.mse_loss)
    with pytest.raises(InvalidOptionError, match="loss has no gradient"):
        tep.diagnose(Model(), BATCH, lambda model, batch: model.weight.sum())
