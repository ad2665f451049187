"""What the pictures are drawn from."""

import csv
from pathlib import Path

import pytest

from quantpage.bench.plots import draw_bars, draw_roofline, read_rows

pytestmark = pytest.mark.pure
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-decode.csv"


def test_a_case_and_format_is_drawn_once():
    rows = read_rows(RESULTS)
    keys = [(r["case"], r["format"]) for r in rows]
    assert len(keys) == len(set(keys)) > 20


def test_of_two_launches_that_read_one_format_the_faster_is_drawn(tmp_path):
    head, *lines = RESULTS.read_text().splitlines()
    row = dict(zip(head.split(","), next(csv.reader(lines[:1])), strict=True))
    table = tmp_path / "two.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(row | {"microseconds": time} for time in ("12.5", "9.75", "30"))
    (one,) = read_rows(table)
    assert one["microseconds"] == "9.75"


def test_a_file_without_rows_is_refused():
    with pytest.raises(ValueError, match="expected rows of write"):
        read_rows(RESULTS, op="write")


def test_pictures_come_from_the_rows(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    for draw in (draw_roofline, draw_bars):
        draw(RESULTS, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
