"""docs/reliability.md names tests; they are there, and there is one for every defect."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure
ROOT = Path(__file__).parent.parent
ROWS = [
    line.split("|")[1:-1]
    for line in (ROOT / "docs/reliability.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| defect |")
]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(tests/\S+::\S+)`", row[2])})


@lru_cache
def names_in(path: str) -> set[str]:
    body = ast.parse((ROOT / path).read_text()).body
    return {each.name for each in body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_the_table_names_exists(name):
    path, test = name.split("::")
    assert test.startswith("test_") and test in names_in(path)


def test_every_defect_has_a_promise_and_a_test():
    for row in ROWS:
        assert len(row) == 3 and row[1].strip() and re.search(r"`tests/\S+::\S+`", row[2]), row
    assert [int(n) for row in ROWS for n in re.findall(r"^ D(\d+):", row[0])] == list(range(1, 28))
