"""The model bench writes what its rows are said to hold, for steps and for prompts."""

import csv
import sys

import pytest

from quantpage.bench import cpu_model
from tests.integrations.tiny_models import save_tiny

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("flags", "kind"), [([], "decode"), (["--prompts"], "prompt")])
def test_rows_of_the_model_bench(tmp_path, monkeypatch, flags, kind):
    out = tmp_path / "rows.csv"
    given = ["cpu_model", "--model", str(save_tiny(tmp_path / "model")), "--out", str(out)]
    given += ["--contexts", "20,40", "--steps", "3", "--threads", "1", *flags]
    monkeypatch.setattr(sys, "argv", given)
    cpu_model.main()
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["context"], row["cache"], row["weights"]) for row in rows] == [
        (context, name, weights) for context in ("20", "40") for name, _, weights in cpu_model.RUNS
    ]
    for row in rows:
        tokens = int(row["context"]) if kind == "prompt" else 1
        said = float(row[f"{kind}_tokens_per_s"])
        assert said == pytest.approx(tokens * 1e3 / float(row[f"{kind}_ms_median"]), rel=0.01)
        assert (float(row["times_transformers"]) == 1) or row["cache"] != "transformers"
