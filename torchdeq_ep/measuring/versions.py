"""Versions and settings that a number may depend on, for a report."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import torch

from torchdeq_ep.plugins import GROUPS, entries

_OWN = "torchdeq-ep"
_OTHERS = ("torchdeq", "torch", "einops", "numpy", "matplotlib", "pandas", "rich", "scikit-learn", "pytorch-lightning")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")


def environment() -> dict[str, dict[str, str]]:
    """What this process runs on: versions, devices, and torch's settings. `torchdeq-ep env` prints it.

    Returns:
        Texts by name, in three groups: `"versions"`, `"devices"` and `"settings"`. Nothing is in it that tells who or
        where you are, no paths and no host name.

    Example:
        >>> found = environment()
        >>> list(found), found["versions"]["torch"] == torch.__version__
        (['versions', 'devices', 'settings'], True)
    """
    return {"versions": _versions(), "devices": _devices(), "settings": _settings()}


def _versions() -> dict[str, str]:
    plugins = {entry.dist.name for group in GROUPS for entry in entries(group) if entry.dist}
    names = [_OWN, *sorted(plugins - {_OWN}), *_OTHERS]
    found = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    return {**found, **{name: _version(name) for name in names}, "system": platform.platform()}


def _version(name: str) -> str:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return "not installed"
    return torch.__version__ if name == "torch" else found.version + (" (editable)" if _is_editable(found) else "")


def _is_editable(found: Distribution) -> bool:
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _devices() -> dict[str, str]:
    cuda = (
        [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cuda": f"{torch.version.cuda}: {', '.join(cuda)}" if cuda else "none",
        "mps": "available" if torch.backends.mps.is_available() else "none",
    }


def _settings() -> dict[str, str]:
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "default dtype": str(torch.get_default_dtype()),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "autocast": "cuda"
        if torch.is_autocast_enabled("cuda")
        else "cpu"
        if torch.is_autocast_enabled("cpu")
        else "off",
        **variables,
    }
