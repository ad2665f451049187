"""How benches keep their rows and take their time."""

import csv

import pytest
import torch

from quantpage.bench import timing
from quantpage.bench.cases import Case
from quantpage.bench.rows import Rows, environment, row_of
from quantpage.bench.timing import Sample

pytestmark = pytest.mark.pure


def test_a_row_is_printed_and_kept_as_soon_as_it_is_there(tmp_path, capsys):
    out = tmp_path / "new" / "rows.csv"
    rows = Rows(out, {"device": "a machine"}, case=8, microseconds=-9)
    for number in (1, 2):
        rows.add({"case": f"case {number}", "microseconds": number / 3, "more": number})
        with out.open() as file:
            kept = list(csv.DictReader(file))
        assert [each["case"] for each in kept] == [f"case {n + 1}" for n in range(number)]
        assert list(kept[-1]) == ["case", "microseconds", "more", "device"]
        assert kept[-1]["device"] == "a machine"
    assert capsys.readouterr().out.splitlines() == [
        "case            us",
        "case 1      0.3333",
        "case 2      0.6667",
    ]


def test_a_kernels_row_says_its_speed_beside_the_copy():
    case = Case(16, 8192, new=4, head_dim=64)
    row = row_of("decode", case, "int8", (case.name, "one"), (20.0, 40_000_000, 4.0, 1.23e-3))
    assert (row.case, row.new, row.head_dim) == ("16 x 8k", 4, 64)
    assert (row.tb_per_s, row.of_copy, row.error) == (2.0, 0.5, 0.0012)


def test_what_a_row_says_of_the_machine():
    about = environment("cpu", "abc")
    assert (about["torch"], about["commit"]) == (torch.__version__, "abc")
    assert "triton" not in about


def test_disturbed_samples_do_not_count_while_three_others_are_left():
    quiet, lost = [Sample(t, True) for t in (5.0, 7.0, 6.0)], [Sample(1.0, False)] * 4
    assert timing.timing([*lost, *quiet]) == (5.0, 6.0, 3, 7)
    # Else the three fastest, whatever they met.
    assert timing.timing([*quiet[:2], *lost]) == (1.0, 1.0, 2, 6)


def test_a_sample_is_of_the_clock_that_is_handed_in():
    ticks = iter((1.0, 3.5))
    taken = timing.sample(lambda: None, lambda: next(ticks))
    assert taken.seconds == 2.5
