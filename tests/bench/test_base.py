"""A tree beside an earlier one: what is joined, and that each runs its own code."""

import csv
import subprocess
from pathlib import Path

import pytest

import quantpage
from quantpage.bench import base
from quantpage.cli.app import run

pytestmark = pytest.mark.cpu

HERE = Path(quantpage.__file__).parent.parent


def in_a_checkout():
    found = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True)
    return found.returncode == 0


def row(what, time, case="8 x 4k"):
    return {"case": case, "what": what, "threads": "1", "microseconds": time}


def test_rows_are_joined_by_what_was_timed():
    before = [
        [row("a", "10"), row("b", "4")],
        [row("a", "30")],
        [row("a", "20"), row("c", "wrong")],
    ]
    after = [[row("a", "5"), row("d", "1")], [row("a", "15")], [row("a", "10"), row("c", "7")]]
    rows = {each["what"]: each for each in base.joined("cpu", before, after)}
    assert rows["a"] == {
        "case": "8 x 4k", "what": "a", "threads": "1", "time": "microseconds", "before": "20",
        "after": "10", "ratio": "0.500", "turns": "3",
    }  # fmt: skip
    assert (rows["b"]["after"], rows["b"]["ratio"]) == ("-", "-")
    assert (rows["d"]["before"], rows["d"]["ratio"]) == ("-", "-")
    # A check that failed is no time.
    assert (rows["c"]["before"], rows["c"]["after"], rows["c"]["turns"]) == ("-", "7", "0")


def test_every_bench_with_a_base_says_what_it_times():
    from quantpage.cli import bench

    offered = {
        each.name
        for each in bench.app.registered_commands
        if "base" in vars(each.callback)["__signature__"].parameters
    }
    assert offered == {name.replace("_", "-") for name in base.TIMED}


@pytest.mark.skipif(not in_a_checkout(), reason="the package stands in no checkout")
def test_each_tree_runs_its_own_code(tmp_path, monkeypatch, capsys):
    made = base.make_tree

    def slower(commit, folder):
        tree = made(commit, folder)
        path = tree / "quantpage/bench/bookkeeping.py"
        text = path.read_text()
        # A case that this tree does not have.
        path.write_text(text + '\nCASES["of the other tree"] = single_pages\n')
        return tree

    monkeypatch.setattr(base, "make_tree", slower)
    monkeypatch.setattr(base, "TURNS", 1)
    out = tmp_path / "rows.csv"
    given = ["bench", "bookkeeping", "--operations", "640", "--base", "HEAD", "--out", str(out)]
    assert run(given) == 0
    with out.open() as file:
        rows = {each["case"]: each for each in csv.DictReader(file)}
    other = rows.pop("of the other tree")
    assert other["after"] == other["ratio"] == "-" and float(other["before"]) > 0
    assert rows and all(each["turns"] == "1" for each in rows.values())
    header, *printed = capsys.readouterr().out.splitlines()
    assert header.split() == ["case", "time", "before", "after", "ratio", "turns"]
    assert len(printed) == len(rows) + 1
    assert run(["bench", "bookkeeping", "--base", "no-such-commit"]) == 2
    assert "base: expected a commit of the checkout" in capsys.readouterr().err


def test_the_words_of_a_bench_that_fails_are_handed_on(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'operation'"):
        base.run_tree(HERE, "bookkeeping", {"operation": 64}, tmp_path / "rows.csv")
