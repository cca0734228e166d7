"""What a recorded run says of the machine: enough to judge the figures, and no names."""

from typing import Any

import pytest
import torch

import torchdeq_ep


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info["cpu"]
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", cpu.get("arch_string_raw", "")),
        cores=cpu.get("count"),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torchdeq_ep=torchdeq_ep.__version__,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)
