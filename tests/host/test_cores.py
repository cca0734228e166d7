"""The cores of this package are configured like those of torchdeq."""

import argparse

import pytest
import torchdeq
from torchdeq.core import DEQIndexing

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, UnknownBackwardError

TIGHT = {"f_max_iter": 200, "f_tol": 1e-12, "b_max_iter": 200, "b_tol": 1e-12}


@pytest.mark.parametrize("core", ["ep-sliced", "ep-indexing"])
@pytest.mark.parametrize("how", ["keywords", "dict", "namespace", "object"])
def test_cores_are_configured_like_torchdeqs(core, how):
    options = {**TIGHT, "core": core, "backward": "ep:beta=0.02", "n_states": 2}
    deq = {
        "keywords": lambda: torchdeq.get_deq(**options),
        "dict": lambda: torchdeq.get_deq(dict(options)),
        "namespace": lambda: torchdeq.get_deq(argparse.Namespace(**options)),
        "object": lambda: torchdeq.get_deq({**options, "backward": tep.get_backward("ep:beta=0.02")}),
    }[how]()
    assert isinstance(deq, DEQIndexing) == (core == "ep-indexing")
    assert deq.f_max_iter == 200
    assert len(deq.produce_grad) == 2
    assert deq.produce_grad[-1].mode == tep.get_backward("ep:beta=0.02")


def test_cores_default_to_ep_and_refuse_unknown_modes():
    assert torchdeq.get_deq(core="ep-sliced").produce_grad[-1].mode == tep.get_backward("ep")
    with pytest.raises(UnknownBackwardError, match="Did you mean 'ep'"):
        torchdeq.get_deq(core="ep-sliced", backward="epp")
    with pytest.raises(InvalidOptionError, match="Did you mean 'beta'"):
        torchdeq.get_deq(core="ep-indexing", backward="ep:betta=0.1")


def test_cores_may_be_switched_and_restored():
    deq = torchdeq.get_deq(core="ep-indexing", backward="aep", **TIGHT)
    with tep.use_backward(deq, "ift"):
        assert deq.produce_grad[-1].mode == tep.get_backward("ift")
    assert deq.produce_grad[-1].mode == tep.get_backward("aep")


def test_arguments_beside_torchdeqs():
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    tep.add_ep_args(parser)
    args = parser.parse_args(["--core", "ep-sliced", "--backward", "ep-richardson:order=6", "--f_max_iter", "7"])
    deq = torchdeq.get_deq(args)
    assert deq.produce_grad[-1].mode == tep.get_backward("ep-richardson:order=6")
    assert deq.f_max_iter == 7
    assert parser.parse_args([]).backward == "ep"


def test_a_bad_mode_on_the_command_line_is_an_argparse_error(capsys):
    parser = argparse.ArgumentParser()
    tep.add_ep_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--backward", "hepp"])
    assert "Did you mean 'hep'" in capsys.readouterr().err


def test_importing_changes_nothing_but_torchdeqs_registries():
    code = (
        "import torch, warnings; before = (torch.get_default_dtype(), torch.get_rng_state(), list(warnings.filters));"
        "import torchdeq_ep; import torchdeq.core;"
        "assert torch.get_default_dtype() == before[0] and torch.equal(torch.get_rng_state(), before[1]);"
        "assert list(warnings.filters) == before[2];"
        "assert {'ep-sliced', 'ep-indexing'} <= set(torchdeq.core._core)"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)
