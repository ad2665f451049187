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


def test_a_run_that_was_ended_goes_on_in_the_same_file(tmp_path):
    out, same = tmp_path / "rows.csv", ("device", "case", "length")
    Rows(out, {"device": "one"}, same, case=8).add({"case": "a", "length": 5, "found": 1})
    again = Rows(out, {"device": "one"}, same, case=8)
    assert again.there({"case": "a", "length": 5})
    assert not again.there({"case": "a", "length": 6})
    assert not Rows(out, {"device": "two"}, same, case=8).there({"case": "a", "length": 5})
    again.add({"case": "b", "length": 6, "found": 0})
    kept = out.read_text().splitlines()
    assert kept == ["case,length,found,device", "a,5,1,one", "b,6,0,one"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("some notes\n", "without case, device"),
        ("case,found\na,1\n", "without device"),
        ("case,device\na\n", "whose lines differ in length"),
        ("case,device\na,one,more\n", "whose lines differ in length"),
        (b"case,device\n\xff,one\n", "can't decode"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, content, why):
    out = tmp_path / "rows.csv"
    data = content if isinstance(content, bytes) else content.encode()
    out.write_bytes(data)
    with pytest.raises(ValueError, match=why):
        Rows(out, {"device": "one"}, ("case", "device"), case=8)
    assert out.read_bytes() == data
