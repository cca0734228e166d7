"""`make wheels`: the built distributions as somebody gets them from an index, without the checkout.

They are installed together into an environment of their own, and run in an empty folder: an import of each, the
examples of the README, and the command line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "wheels"
COMMANDS = (
    ["torchdeq-ep", "env"],
    ["torchdeq-ep", "list"],
    ["torchdeq-ep", "errors", "NotHolomorphicError"],
    ["torchdeq-ep", "compare", "--backward", "ift", "--backward", "ep", "--repeats", "1"],
    ["torchdeq-ep", "train", "--help"],
    ["torchdeq-ep", "physics", "--help"],
)


def main() -> int:
    """Install and run.

    Returns:
        0; what fails raises.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels are")
    parser.add_argument("--torch-flags", default="", help="for the installation of torch alone, as TORCH_FLAGS of make")
    options = parser.parse_args()
    wheels = sorted(options.folder.glob("*.whl"))
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "--disable-pip-version-check", "install", "-qq"]
    # The torch of constraints.txt, or a build of it that is gigabytes larger may be chosen.
    subprocess.run([*pip, *options.torch_flags.split(), "-c", str(ROOT / "constraints.txt"), "torch"], check=True)
    extras = {"torchdeq_ep": "[compare]", "torchdeq_ep_physics": "[recipes]"}
    named = [f"{wheel.resolve()}{extras.get(wheel.name.partition('-')[0], '')}" for wheel in wheels]
    subprocess.run([*pip, *named], check=True)
    empty = ENVIRONMENT / "empty"
    empty.mkdir()
    environment = {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", "HOME": str(empty), "COLUMNS": "100"}
    readme = "".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    modules = ", ".join(wheel.name.partition("-")[0] for wheel in wheels)
    where = "import sys, torchdeq_ep; print(torchdeq_ep.__version__, torchdeq_ep.__file__)"
    for command in (["python", "-c", f"import {modules}; {where}"], ["python", "-c", readme], *COMMANDS):
        print("$", *(command[:2] if "\n" in command[-1] else command), flush=True)
        program = [str(ENVIRONMENT / "bin" / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=empty, env=environment, capture_output=True, text=True)
        print(*done.stdout.splitlines()[:16], sep="\n", flush=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
        assert str(ROOT / "torchdeq_ep") not in done.stdout, "the checkout was used in place of the wheel"
    print(f"{len(wheels)} wheels installed and used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
