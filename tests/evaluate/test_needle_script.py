"""scripts/needle: a run that goes on, and what it refuses."""

import csv
import sys

import pytest

from scripts import needle
from tests.server.small import save_small

pytestmark = pytest.mark.cpu


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Call it; its rows."""
    folder, text, out = save_small(tmp_path / "small"), tmp_path / "text", tmp_path / "rows.csv"
    text.write_text("It is a truth that nobody knows. " * 40)

    def call(*flags):
        command = ["needle.py", "--model", folder, "--text", text, "--csv", out]
        command += ["--formats", "none,int8", "--lengths", "200,240", "--depths", "0,1", *flags]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        needle.main()
        with out.open() as file:
            return list(csv.DictReader(file))

    return call


def test_every_cell_is_asked_once(ask, monkeypatch):
    first = ask("--lengths", "200")
    asked = []
    whole = needle.log_probabilities
    monkeypatch.setattr(
        needle, "log_probabilities", lambda *a, **k: asked.append(a) or whole(*a, **k)
    )
    rows = ask()
    assert rows[:4] == first and len(rows) == 8 and len(asked) == 4
    cells = [(row["kv_format"], row["length"], row["depth"]) for row in rows]
    assert len(set(cells)) == 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lengths", "many"], "argument --lengths: invalid lengths value: 'many'"),
        (["--depths", "0.5,2"], "argument --depths: invalid depths value: '0.5,2'"),
        (["--lengths", "9"], "needle lengths: expected more than"),
        (["--lengths", "600"], "prompt: expected fewer than 512 tokens"),
        (["--text", "nowhere"], "text: expected a text file, got nowhere"),
        (["--formats", "int5"], "kv_format: expected one of"),
        (["--model", "nowhere"], "model: expected a model's folder"),
        (["--csv", "/dev/full"], "csv: expected a file to write"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_what_cannot_be_asked(ask, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        ask(*flags)
    assert said in capsys.readouterr().err
