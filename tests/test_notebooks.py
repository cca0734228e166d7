"""The notebooks run from top to bottom, and a notebook shows results as tables and figures."""

import io
import json
import sys
import types
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
import torchdeq
from torch import nn

import torchdeq_ep as tep

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """As a kernel would: a cell that ends in an expression shows its value."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "committed without outputs"
    namespace = {"__name__": "__main__"}
    for cell in cells:
        source = "".join(cell["source"]).replace("%pip install", "pass  # ")
        exec(compile(source, str(path), "exec"), namespace)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.deq = nn.Linear(6, 6), torchdeq.get_deq(ift=True, f_tol=1e-6)

    def forward(self, x):
        return self.deq(lambda z: 0.5 * torch.tanh(self.layer(z)) + x, torch.zeros_like(x))[0][-1]


@pytest.fixture(scope="module")
def table():
    torch.manual_seed(0)
    written = io.StringIO()
    with redirect_stderr(written):
        found = tep.compare(Model(), torch.randn(3, 6), torch.Tensor.sum, ["ift", "ep", "hep"], repeats=1)
    assert written.getvalue() == ""
    return found


def test_a_comparison_is_a_table_and_a_sentence(table):
    html = table._repr_html_()
    assert html.count("<tr>") == 1 + len(table.rows)
    assert table.sentence() in html
    assert repr(table) == f"<Comparison of 3 backward passes: {table.sentence()}>"


def test_print_shows_the_table(table):
    heading, *lines = str(table).splitlines()
    assert heading.split()[0] == "backward"
    assert [line.split()[0] for line in lines[:3]] == ["ift", "ep", "hep"]
    assert str(table).endswith(f"{table.conditions()}\n{table.sentence()}")
    assert len({len(line) for line in lines[:3]}) == 1  # and numbers end in one column


def test_print_of_a_diagnosis_shows_parts_and_advice():
    torch.manual_seed(0)
    diagnosis = tep.diagnose(Model(), torch.randn(3, 6), torch.Tensor.sum)
    parts, measures, advice = str(diagnosis).split("\n\n")
    assert parts.splitlines()[0].split() == ["where", "total", "finite", "nudge", "asymmetry", "convergence"]
    assert measures.splitlines()[1].split()[0] == "deq"
    assert advice == "\n".join(diagnosis.advice)


def test_words_of_a_mode_are_no_markup():
    row = tep.measuring.Row("<b>mode</b>", "own", error="1 < 2")
    html = tep.measuring.Comparison((row,), "dense", 1, "cpu", 1)._repr_html_()
    assert "<b>" not in html
    assert "1 &lt; 2" in html


def test_a_plot_without_a_path_is_a_picture(table):
    assert table.plot()._repr_png_().startswith(b"\x89PNG")


def test_the_profiler_is_silent(capfd):
    tep.compare(Model(), torch.randn(3, 6), torch.Tensor.sum, ["ep"], repeats=1)
    assert capfd.readouterr().err == ""


def test_handles_and_reports_can_be_read():
    model = Model()
    with tep.use_backward(model, "ep", homeostasis=0.1) as handle:
        model(torch.randn(3, 6)).sum().backward()
        assert "1 backward pass" in repr(handle)
        html = handle.last["deq"]._repr_html_()
        assert "adjoint residual" in html
        assert "nan" not in html
        assert "HomeostasisHandle on 1 DEQ" in repr(handle.homeostasis)
    hook = tep.register_fixed_point_hook(model, print)
    assert repr(hook) == "<FixedPointHandle on 1 DEQ>"


def test_a_notebook_is_shown_a_bar(monkeypatch):
    shown = []
    line = types.SimpleNamespace(update=lambda html: shown.append(html))
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda _, display_id: line
    shell = types.ModuleType("IPython")
    shell.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    tep.compare(Model(), torch.randn(3, 6), torch.Tensor.sum, ["ep"], repeats=1)
    assert "<progress value=0" in shown[0]
    assert shown[-1] == ""


def test_elsewhere_nothing_is_shown(capfd):
    tep.diagnose(Model(), torch.randn(3, 6), torch.Tensor.sum)
    assert capfd.readouterr() == ("", "")
