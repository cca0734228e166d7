"""Two processes under DistributedDataParallel get the gradients of one process on the joined batch."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchdeq
from torch import nn

import torchdeq_ep as tep


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.layer = nn.Linear(3, 6).double(), nn.Linear(6, 6).double()
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        self.deq = torchdeq.get_deq(core="ep-sliced", f_max_iter=200, f_tol=1e-13)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.encoder(inputs)
        (z,), _ = self.deq(lambda z: torch.tanh(self.layer(z) + x), torch.zeros_like(x))
        return z


Result = Callable[[nn.Module, torch.Tensor, float], list[torch.Tensor]]


def _inputs() -> torch.Tensor:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Module, inputs: torch.Tensor, weight: float) -> list[torch.Tensor]:
    homeostasis = tep.register_homeostasis(model, weight=weight, estimator="error-vector")
    for _ in range(2):  # the second pass goes through DDP's rebuilt buckets
        model.zero_grad()
        (model(inputs).pow(2).sum(1).mean() + homeostasis.penalty()).backward()
    return [parameter.grad for parameter in model.parameters()]


def _descended(model: nn.Module, inputs: torch.Tensor, share: float) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)  # only the descent moves
    tep.use_backward(model, "ift", tol=1e-12)  # the amplitude of a nudge would depend on the process
    tep.register_homeostasis(model, share, estimator="error-vector", descent=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).pow(2).sum(1).mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def _worker(rank: int, port: int, folder: str, result: Result, weight: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_Model())
    torch.save(result(model, _inputs().chunk(2)[rank], weight), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("result", "weight"),
    [pytest.param(_gradients, 0.0, marks=pytest.mark.slow), (_gradients, 5.0), (_descended, 0.3)],
)
def test_two_processes_equal_one(tmp_path, result, weight):
    """Without and with homeostasis along the error vector, in the loss and beside it."""
    expected = result(_Model(), _inputs(), weight)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_worker, args=(port, str(tmp_path), result, weight), nprocs=2, start_method="spawn")
    for rank in range(2):
        for got, reference in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            # The length of a descent comes from a norm in single precision.
            tight, loose = {"rtol": 1e-7, "atol": 1e-10}, {"rtol": 2e-6, "atol": 1e-8}
            torch.testing.assert_close(got, reference, **(loose if result is _descended else tight))


def test_a_switched_model_switches_inside_ddp_too():
    model = _Model()
    with tep.use_backward(nn.ModuleList([model]), "aep") as handle:
        assert handle.deqs == (model.deq,)
