"""The load test of scripts/load_test.py, shorter; it says itself what it checks."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_test.py"


def test_a_crowd_in_a_small_pool_gets_what_each_gets_alone():
    command = [sys.executable, str(SCRIPT), "--seconds", "4", "--kv-format", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong, " in done.stdout
