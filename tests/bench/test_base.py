"""A tree beside an earlier one: what is joined, and that each runs its own code."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest

import quantpage
from quantpage.bench import base
from quantpage.cli import exit_codes
from quantpage.cli.app import run
from quantpage.cpu_core import find_core
from quantpage.errors import Unavailable

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


def test_a_bench_that_refuses_is_heard_in_its_own_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"bookkeeping of this tree: No such option: --operation"):
        base.run_tree(HERE, "bookkeeping", {"operation": 64}, tmp_path / "rows.csv")
    with pytest.raises(
        ValueError, match=r"bench cpu of this tree: cases: expected names of .*'9 x 9'"
    ):
        base.run_tree(HERE, "cpu", {"cases": "9 x 9", "threads": 1}, tmp_path / "rows.csv")
    codes = {exit_codes.WRONG_INPUT: ValueError, exit_codes.UNAVAILABLE: Unavailable}
    assert codes == base.SENTENCES


def test_a_bench_that_breaks_leaves_its_last_words(tmp_path):
    tree = checkout(tmp_path)
    (tree / "src/quantpage/bench/bookkeeping.py").write_text("raise LookupError('no books')")
    with pytest.raises(RuntimeError, match=r"(?s)bookkeeping of the base: it ended with.*no books"):
        base.run_tree(tree / "src", "bookkeeping", {}, tmp_path / "rows.csv")


def test_flags_are_written_as_the_commands_read_them():
    given = {"check_only": True, "flex": False, "cases": "-1 x 4k;8 x 8k", "rest": 0.5}
    words = [base._flag(*each) for each in given.items()]
    assert words == ["--check-only", "--no-flex", "--cases=-1 x 4k;8 x 8k", "--rest=0.5"]


def checkout(tmp_path):
    """A folder with this tree's package in it, and a core's source that is not this tree's."""
    tree = tmp_path / "checkout"
    shutil.copytree(HERE, tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "csrc").mkdir()
    (tree / "csrc/attend.cpp").write_text("void attend() {}")
    (tree / "README.md").write_text("")
    return tree


def test_a_folder_is_a_base_where_no_history_is(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_core", lambda: None)
    tree = base.make_tree(str(checkout(tmp_path)), tmp_path)
    # No core here, none there: nothing is compiled, whatever the sources are.
    assert tree == tmp_path / "tree/src" and not list(tree.rglob("*.so"))
    given = {"operations": 640}
    rows = base.run_tree(tree, "bookkeeping", given, tmp_path / "rows.csv")
    assert rows and all(float(row["microseconds_each"]) > 0 for row in rows)
    with pytest.raises(ValueError, match=r"base: expected a folder with src/quantpage in it"):
        base.make_tree(str(tmp_path / "checkout/csrc"), tmp_path / "other")


@pytest.mark.skipif(find_core() is None, reason="no compiled core in this installation")
@pytest.mark.skipif(not in_a_checkout(), reason="the package stands in no checkout")
def test_a_core_is_compiled_where_its_sources_differ(tmp_path):
    made = checkout(tmp_path)
    with pytest.raises(RuntimeError, match="it cannot be installed"):
        # It is no project that pip knows.
        base.make_tree(str(made), tmp_path)
    shutil.rmtree(made / "csrc")
    shutil.copytree(HERE.parent / "csrc", made / "csrc")
    shutil.copy(HERE.parent / "CMakeLists.txt", made)
    (tmp_path / "same").mkdir()
    tree = base.make_tree(str(made), tmp_path / "same")
    given = {"cases": "SmolLM2 512", "formats": "int8", "seconds": 0.01, "threads": 1}
    rows = base.run_tree(tree, "cpu", given, tmp_path / "rows.csv")
    assert any(row["what"].startswith("int8 ") for row in rows)
