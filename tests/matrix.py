"""`make matrix`: the tests of the package on the oldest and newest versions it supports, and on every Python found.

Each pair has an environment of its own in `build/matrix`, made again when the requirements change. *Oldest* is the
lowest series that `pyproject.toml` allows of torch and all other requirements (2.4.x for `torch>=2.4`), *newest* what
an installer brings today. With `--record`, results go to `docs/results/matrix.json` and the table of `docs/support.md`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "figures"))
from pages import insert  # noqa: E402

ENVIRONMENTS = ROOT / "build" / "matrix"
RESULTS = ROOT / "docs" / "results" / "matrix.json"
PAGE = ROOT / "docs" / "support.md"
START, END = "<!-- The table is written by `make matrix`. -->", "<!-- End of the table. -->"
SHOWN = ("torch", "torchdeq", "einops", "numpy", "matplotlib")
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
PAGES = (
    "docs",
    "site",
    "benchmark_page",
    "cli_page",
    "release",
    "notebooks",
)  # of the whole checkout, not of the package
RANGE = re.compile(r"^([\w-]+)(?:\[[^\]]*\])?>=([\d.]+)$")


class Python(NamedTuple):
    """An interpreter, and its version as two numbers."""

    path: str
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """As in `3.12`."""
        return ".".join(map(str, self.version))


class Pair(NamedTuple):
    """A Python, and which end of the ranges of versions."""

    python: Python
    versions: str

    @property
    def folder(self) -> Path:
        """Where its environment is."""
        return ENVIRONMENTS / f"{self.python.name}-{self.versions}"


def pythons() -> list[Python]:
    """Every Python of at least 3.11 on the path and in pyenv, one of a minor version, in their order."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, *(f"python3.{minor}" for minor in range(11, 20)), "python3"]
    candidates += map(str, sorted(pyenv.glob("versions/*/bin/python")))
    found: dict[tuple[int, int], Python] = {}
    code = "import sys; print(sys.version_info[0], sys.version_info[1], sys._base_executable)"
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode:  # a shim of a version that is not installed
            continue
        major, minor, base = done.stdout.split(maxsplit=2)
        version = int(major), int(minor)
        if version >= (3, 11):
            found.setdefault(version, Python(base.strip(), version))
    return [found[version] for version in sorted(found)]


def requirements(versions: str) -> list[str]:
    """What the package needs, with the extra `compare`: as ranges, or the lowest release of each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["compare"]]
    if versions == "newest":
        return ranges
    return [RANGE.sub(r"\1~=\2.0" if versions == "oldest" else r"\0", text) for text in ranges]


def tools() -> list[str]:
    """What runs the tests, in the versions of `constraints.txt`."""
    pinned = (ROOT / "constraints.txt").read_text().split()
    return [line for line in pinned if line.partition("==")[0] in TOOLS]


def install(pair: Pair, torch_flags: list[str], limit: float) -> None:
    """Make the environment of a pair, unless it is there."""
    wanted = [*requirements(pair.versions), *tools(), *torch_flags]
    stamp, digest = pair.folder / ".installed", hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    shutil.rmtree(pair.folder, ignore_errors=True)
    deadline, uv = time.monotonic() + limit, shutil.which("uv")
    inside = str(pair.folder / "bin" / "python")
    if uv:
        commands = [[uv, "venv", "--quiet", "--python", pair.python.path, str(pair.folder)]]
        pip = [uv, "pip", "install", "--quiet", "--python", inside]
    else:
        commands = [[pair.python.path, "-m", "venv", str(pair.folder)]]
        pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    torch = [text for text in wanted if re.match(r"torch\W", text)]
    commands += [[*pip, *torch_flags, *torch]] if torch_flags else []
    commands += [[*pip, *(text for text in wanted if text not in torch_flags)], [*pip, "--no-deps", "-e", str(ROOT)]]
    for command in commands:
        subprocess.run(command, check=True, timeout=deadline - time.monotonic())
    stamp.write_text(digest)


def test(pair: Pair, arguments: list[str]) -> dict[str, Any]:
    """Run the tests in the environment of a pair."""
    inside = str(pair.folder / "bin" / "python")
    names = ", ".join(f"'{name}'" for name in SHOWN)
    code = (
        f"from importlib.metadata import version as v; import json; print(json.dumps({{n: v(n) for n in [{names}]}}))"
    )
    found = json.loads(subprocess.run([inside, "-c", code], check=True, capture_output=True, text=True).stdout)
    command = [
        inside,
        "-m",
        "pytest",
        "-q",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        "-m",
        "not slow",
        "--doctest-modules",
        "-p",
        "no:cacheprovider",
    ]
    command += arguments or ["tests", "torchdeq_ep", *(f"--ignore=tests/test_{page}.py" for page in PAGES)]
    print(f"== Python {pair.python.name}, {pair.versions}: torch {found['torch']}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    start, lines = time.monotonic(), []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", "".join(lines[-1:]))
    }
    green = running.returncode == 0 and counts.get("passed", 0) > 0
    return {
        "python": pair.python.name,
        "versions": pair.versions,
        "packages": found,
        "counts": counts,
        "green": green,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [["Python", "versions", *SHOWN, "tests"], ["---"] * (3 + len(SHOWN))]
    for result in sorted(results, key=lambda r: (r["versions"] != "oldest", [int(n) for n in r["python"].split(".")])):
        counts = ", ".join(f"{count:,} {word}" for word, count in result["counts"].items())
        lines.append([result["python"], result["versions"], *(result["packages"][name] for name in SHOWN), counts])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(results: list[dict[str, Any]]) -> None:
    """Put results in the place of those of the same pairs, and the table on the page."""
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    kept = {(result["python"], result["versions"]): result for result in [*before, *results]}
    RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    PAGE.write_text(insert(PAGE.read_text(), START, END, table(list(kept.values()))))


def main() -> int:
    """Run what the command line asks for.

    Returns:
        0, or 1 if a test failed or an environment could not be made.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", metavar="3.X", help="of the Pythons found; default: all")
    parser.add_argument("--versions", nargs="*", choices=("oldest", "newest"), help="default: both")
    parser.add_argument("--torch-flags", default="", help="for the installation of torch alone, as TORCH_FLAGS of make")
    parser.add_argument("--install-limit", type=float, default=3600.0, metavar="SECONDS", help="of each environment")
    parser.add_argument("--skip", action="store_true", help="leave out, and say, what cannot be installed in that time")
    parser.add_argument("--record", action="store_true", help="write the results and the table of the documentation")
    parser.add_argument("tests", nargs="*", help="for pytest, in place of all tests; after --")
    options = parser.parse_args()
    found = pythons()
    print("found:", ", ".join(f"{python.name} ({python.path})" for python in found))
    # The oldest releases have wheels for the oldest Python.
    pairs = [Pair(found[0], "oldest"), *(Pair(python, "newest") for python in found)]
    pairs = [pair for pair in pairs if not options.python or pair.python.name in options.python]
    pairs = [pair for pair in pairs if not options.versions or pair.versions in options.versions]
    results, failed, skipped = [], [], []
    for pair in pairs:
        label = f"Python {pair.python.name}, {pair.versions}"
        try:
            install(pair, options.torch_flags.split(), options.install_limit)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            missing = f"{label}: not installed, {type(error).__name__}"
            (skipped if options.skip else failed).append(missing)
            continue
        results.append(test(pair, options.tests))
        if not results[-1]["green"]:
            failed.append(f"{label}: {results[-1]['counts']}")
    if options.record and results:
        write(results)
    print(table(results))
    print("\n".join([*skipped, *(failed or ["all green" if results else "nothing was tested"])]))
    return 1 if failed or not (results or skipped) else 0


if __name__ == "__main__":
    sys.exit(main())
