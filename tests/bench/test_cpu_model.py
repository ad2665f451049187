"""The model bench writes what its rows are said to hold, for steps and for prompts."""

import csv
from itertools import count

import pytest

from quantpage.bench import cpu_model
from quantpage.cli.app import run
from tests.integrations.tiny_models import save_tiny

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("flags", "kind"), [([], "decode"), (["--prompts"], "prompt")])
def test_rows_of_the_model_bench(tmp_path, capsys, flags, kind):
    out = tmp_path / "rows.csv"
    given = ["bench", "cpu-model", "--model", str(save_tiny(tmp_path / "model")), "--out", str(out)]
    assert run([*given, "--contexts", "20,40", "--steps", "3", "--threads", "1", *flags]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["context"], row["cache"], row["weights"]) for row in rows] == [
        (context, name, weights)
        for context in ("20", "40")
        for name, _, weights in (cpu_model.REFERENCE, *cpu_model.RUNS)
    ]
    # A fast machine's times round to nothing: what is checked is what a row is made of.
    for row in rows:
        assert float(row[f"{kind}_ms_best"]) <= float(row[f"{kind}_ms_median"])
        assert float(row[f"{kind}_tokens_per_s"]) > 0
        assert row["times_transformers"] == "1.00" or row["cache"] != "transformers"
    header, *printed = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["context", "cache", "weights"] and len(printed) == len(rows)


def test_runs_are_the_formats_that_are_asked_for(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    given = ["bench", "cpu-model", "--model", str(save_tiny(tmp_path / "model")), "--out", str(out)]
    given += ["--contexts", "20", "--steps", "3", "--threads", "1", "--formats"]
    assert run([*given, "k=int8,v=fp8,last1=int8,none"]) == 0
    with out.open() as file:
        caches = [row["cache"] for row in csv.DictReader(file)]
    assert caches == ["transformers", "k=int8,v=fp8,last1=int8", "none"]
    capsys.readouterr()
    assert run([*given, "int8,layers=3:int4"]) == 2
    assert "expected layers of 0 to 2, got layers=3:int4" in capsys.readouterr().err


def test_times_are_those_of_the_clock():
    """With a clock of its own, so that a machine's speed decides nothing."""
    ticks = count(0.0, 0.25)
    taken = cpu_model.measure({"a": lambda: None}, 1, 3, lambda: next(ticks))
    assert taken["a"][:2] == (0.25, 0.25)
