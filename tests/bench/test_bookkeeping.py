"""The bench of the books does what it counts."""

import pytest

from quantpage.bench.bookkeeping import CASES, measure

pytestmark = pytest.mark.pure


def test_every_case_does_what_it_was_asked_for():
    rows = measure(6400)
    assert [row["case"] for row in rows] == list(CASES)
    wanted = [6400, 6400, 6400, 6400, 640]
    for row, count in zip(rows, wanted, strict=True):
        assert count <= row["operations"] < count + 5000
