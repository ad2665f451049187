"""Compiling in a process that does not interpret, which this one may do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def compile_apart(module: str, *parts: str) -> dict:
    """Name of a case -> its resources, as ``python -m module part`` prints them on its last line.

    parts: what is compiled side by side, a process each; none: all in one.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, *part],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )
        for part in ([(each,) for each in parts] or [()])
    ]  # fmt: skip
    found: dict = {}
    for process in running:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        found.update(json.loads(said.splitlines()[-1]))
    return found


def count(found: dict, pattern: str) -> int:
    """Instructions of a case whose name begins with ``pattern``."""
    return sum(n for name, n in found["counts"].items() if re.match(pattern, name))
