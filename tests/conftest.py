import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state, and leaves the default dtype as it was."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], ModuleType]:
    """Loads a script that is part of no package."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def docs_script(load_script: Callable[[Path], ModuleType]) -> Callable[[str], ModuleType]:
    """Loads a script of `docs/` by its name."""
    return lambda name: load_script(Path(__file__).parents[1] / "docs" / f"{name}.py")
