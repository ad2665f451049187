"""What the pictures are drawn from."""

import csv
from pathlib import Path

import pytest

from quantpage.bench.plots import PICTURES, read_rows
from quantpage.cli.app import run

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
    with pytest.raises(ValueError, match=r"expected rows of .*decode"):
        read_rows(RESULTS.with_name("h200-write.csv"))


def test_the_pictures_of_the_docs_are_drawn(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    given = ["bench", "plots", "--images", str(tmp_path / "new")]
    assert run([*given, "--results", str(RESULTS.parent)]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.name for path in made} == {f"{name}.png" for name in PICTURES}
    assert all(path.stat().st_size > 10_000 for path in made)
    assert run([*given, "--results", str(tmp_path)]) == 2
    assert "results: expected" in capsys.readouterr().err
