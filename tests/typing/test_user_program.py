"""The program of a user passes a strict type checker, and mistakes in it are noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantpage

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")
MISTAKES = {
    'quantpage.find_format("int8"), KVFormat': (
        'quantpage.find_formats("int8"), KVFormat',
        "has no attribute",
    ),
    "page_size=16, max_tokens=1000": ("page_size='16', max_tokens=1000", "incompatible type"),
    "attached.coverage, quantpage.Coverage": ("attached.coverage, str", 'of type "Coverage"'),
    "kept.used_bytes()": ("kept.bytes_used()", "has no attribute"),
    'QuantSpec(CODES["int4"])': ('CODES["int4"]', "incompatible type"),
    "[request.pages], page_size=16": ("request.pages, page_size=16", "incompatible type"),
    "sampling=Sampling(temperature=0)": ("sampling=0.0", "incompatible type"),
    "engine.submit(wanted, take)": ("engine.submit(wanted, print, 1)", "Too many arguments"),
    "cache_shape(LlamaConfig(), tp=2)": ("cache_shape(LlamaConfig(), 'two')", "incompatible type"),
}
"""What stands in the program -> a mistake in its place, and what mypy says of it."""


def test_it_passes_and_mistakes_are_noticed_and_no_public_name_is_any(tmp_path):
    right = PROGRAM.read_text()
    wrong = right
    for stands, (mistake, _) in MISTAKES.items():
        assert wrong.count(stands) == 1, stands
        wrong = wrong.replace(stands, mistake)
    broken = tmp_path / "broken_program.py"
    broken.write_text(wrong)
    names = tmp_path / "names.py"
    shown = [f"reveal_type(quantpage.{name})" for name in quantpage.__all__]
    names.write_text("\n".join(["import quantpage", *shown, ""]))
    # One run: the time is that of reading torch and Transformers.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, (PROGRAM, broken, names))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    assert [line for line in said if "user_program.py" in line] == []
    revealed = [line for line in said if "names.py" in line]
    assert len(revealed) == len(shown), done.stdout
    assert [line for line in revealed if '"Any"' in line or ": error: " in line] == []
    noticed = {
        int(n): line for line in said for n in re.findall(r"broken_program\.py:(\d+): error", line)
    }
    lines = wrong.splitlines()
    for mistake, told in MISTAKES.values():
        number = next(n for n, line in enumerate(lines, 1) if mistake in line)
        assert told in noticed.get(number, ""), (mistake, done.stdout)
