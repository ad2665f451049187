"""`quantpage evaluate --budget` from a folder to the line."""

import csv
import json

import pytest

from quantpage.cli.app import run

pytestmark = pytest.mark.cpu


def test_the_command_prints_the_line_and_writes_the_curve(quantpage, folder, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + i * 7 % 100}" for i in range(400)))
    given = ["evaluate", "--model", folder, "--text", text, "--prompt", "100", "--scored", "20"]
    given += ["--page-size", "16", "--context", "2000", "--budget"]
    out = tmp_path / "curve.csv"
    said = quantpage(*given, "9bits", "--csv", out).out
    line = said.strip().splitlines()[-1]
    assert line.startswith("--kv-format ")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert rows[0]["kind"] == "chosen" and rows[0]["kv_format"] == line.split()[1]
    assert float(rows[0]["bits"]) <= 9 and {row["kind"] for row in rows} == {
        "chosen", "uniform", "curve",
    }  # fmt: skip
    data = json.loads(quantpage(*given, "9", "--json").out)
    assert data["chosen"]["kv_format"] == line.split()[1] and len(data["losses"]) == 6 * 3
    assert run([str(each) for each in [*given, data["chosen"]["kv_format"]]]) == 2
    assert "such as 5.0bits" in quantpage(*given, "nine", code=2).err
    assert "expected at least" in quantpage(*given, "2", code=2).err
