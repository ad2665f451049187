"""Compiling in a process that does not interpret, which this one may do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def compile_apart(module: str) -> dict:
    """Name of a case -> its resources, as ``python -m module`` prints them on its last line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def count(found: dict, pattern: str) -> int:
    """Instructions of a case whose name begins with ``pattern``."""
    return sum(n for name, n in found["counts"].items() if re.match(pattern, name))
