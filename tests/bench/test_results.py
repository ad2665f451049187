"""Rows of benchmarks/results name the commit that was measured: one that a reader can look up."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[2]


def git(*words: str) -> str:
    """What git says of this checkout; skips where there is none, or not all of its history."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"git {words[0]}: {found.stderr.strip()}")
    return found.stdout


def named(row: dict[str, str]) -> str | None:
    """The abbreviated commit of a row: alone, or behind a version."""
    told = (row.get("commit") or row.get("quantpage") or "").split()
    return told[-1] if told and re.fullmatch("[0-9a-f]{7,40}", told[-1]) else None


def test_rows_name_commits_of_this_history():
    """A branch that was measured and then rebased leaves names that nobody has."""
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the history is cut off")
    known = {commit[:7] for commit in git("rev-list", "HEAD").split()}
    unknown = {
        (path.name, commit)
        for path in (ROOT / "benchmarks/results").glob("*.csv")
        for row in csv.DictReader(path.read_text().splitlines())
        if (commit := named(row)) and commit[:7] not in known
    }
    assert not unknown
