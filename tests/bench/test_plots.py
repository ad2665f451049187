"""What the pictures are drawn from."""

from pathlib import Path

import pytest

from quantpage.bench.plots import draw_bars, draw_roofline, read_rows

pytestmark = pytest.mark.pure
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-decode.csv"


def test_the_fastest_launch_of_a_case_is_drawn():
    rows = read_rows(RESULTS)
    keys = [(r["case"], r["implementation"], r["format"]) for r in rows]
    assert len(keys) == len(set(keys))
    (one,) = [r for r in rows if r["case"] == "8 x 8k" and r["format"] == "int8"]
    assert float(one["microseconds"]) == 45.61


def test_a_file_without_rows_is_refused():
    with pytest.raises(ValueError, match="expected rows of write"):
        read_rows(RESULTS, op="write")


def test_pictures_come_from_the_rows(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    for draw in (draw_roofline, draw_bars):
        draw(RESULTS, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
