"""Every class of Transformers that reads pages, in the embedded engine: three requests that share
steps against the class itself, unattached, without a cache.

    python scripts/sweep_engine.py --out benchmarks/results/models-engine.csv    # ten minutes
    python scripts/sweep_engine.py --only llama,gemma3

With --document docs/models.md as well the page's list is made from the CSV, and nothing is run.
"""

import argparse
import copy
import csv
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from quantpage.engine import Limits, Request, Sampling
from quantpage.errors import UnsupportedModel
from quantpage.evaluate.run import made_with
from scripts.sweep_models import LISTS, build, forked, said
from scripts.sweep_models import read as read_attached
from tests.engine.asked import ask_all, engine

START, END = "<!-- engine sweep -->", "<!-- end of engine sweep -->"
ATTACHED = Path(__file__).parents[1] / "benchmarks/results/models.csv"
LENGTHS, NEW = (37, 50, 23), 10
"""Tokens of the prompts, of which a step takes 24, and of the answers."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the engine did with one class."""

    kind: str
    model_type: str
    name: str
    verdict: str
    """served, refused, wrong, error, not tried."""
    why: str = ""
    device: str = ""
    torch: str = ""
    transformers: str = ""
    quantpage: str = ""
    date: str = ""


@torch.no_grad()
def likeliest(model, prompt):
    """NEW tokens, each by a forward over all before it."""
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def judge(kind, model_type):
    """A Row for one class."""
    name = LISTS[kind][model_type]
    name = name[0] if isinstance(name, (list, tuple)) else name
    base = {"kind": kind, "model_type": model_type, "name": name, **made_with("cpu")}
    prompts = [
        tuple(8 + (7 * at + 13 * number) % 80 for at in range(length))
        for number, length in enumerate(LENGTHS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(model_type, name)
            wanted = [likeliest(copy.deepcopy(model), each) for each in prompts]
        except Exception as error:  # noqa: BLE001
            return Row(**base, verdict="not tried", why=said(error))
        greedy = Sampling(temperature=0)
        asked = [Request(each, max_tokens=NEW, sampling=greedy) for each in prompts]
        try:
            limits = Limits(pages=60, max_running=8, step_tokens=24)
            with engine("none", model=model, limits=limits) as one:
                answers = ask_all(one, asked)
        except UnsupportedModel as refusal:
            return Row(**base, verdict="refused", why=str(refusal).partition(": ")[2])
    failed = next((each.errors[0] for each in answers if each.errors[0] is not None), None)
    if failed is not None:
        return Row(**base, verdict="error", why=said(failed))
    got = [[ord(letter) - 0x100 for letter in each.texts[0]] for each in answers]
    wrong = [at for at, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b]
    if wrong:
        return Row(**base, verdict="wrong", why=f"requests {wrong}")
    return Row(**base, verdict="served")


def document(rows, path):
    """Write the list of docs/models.md between its marks."""
    counts = Counter(each.verdict for each in rows)
    lines = ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + "."]
    lines += ["", "| not served | because |", "| --- | --- |"]
    reasons = {}
    for each in rows:
        if each.verdict != "served":
            why = each.why if each.verdict == "refused" else f"{each.verdict}: {each.why}"
            reasons.setdefault(why, []).append(each.model_type)
    for why, found in sorted(reasons.items(), key=lambda each: -len(each[1])):
        lines.append(f"| {', '.join(dict.fromkeys(found))} | {why} |")
    text = path.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    path.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a class")
    parser.add_argument("--document", type=Path, help="a page to write the rows of --out into")
    arguments = parser.parse_args()
    if arguments.document:
        with arguments.out.open() as file:
            document([Row(**each) for each in csv.DictReader(file)], arguments.document)
        return False
    torch.set_num_threads(1)
    wanted = arguments.only.split(",") if arguments.only else None
    done = []
    for each in read_attached(ATTACHED):
        if each.verdict not in ("kernels", "partly", "dense"):
            continue
        if wanted is not None and each.model_type not in wanted:
            continue
        found = forked(lambda each=each: asdict(judge(each.kind, each.model_type)), arguments.limit)
        late = {"verdict": "not tried", "why": f"no answer within {arguments.limit:g} s"}
        about = {"kind": each.kind, "model_type": each.model_type, "name": each.name}
        row = Row(**(found or {**about, **late, **made_with("cpu")}))
        done.append(row)
        if row.verdict != "served":
            print(f"{row.kind} {row.model_type}: {row.verdict} {row.why}", flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            table = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
            table.writeheader()
            table.writerows(map(asdict, done))
    print(dict(Counter(each.verdict for each in done)))
    return any(each.verdict in ("wrong", "error") for each in done)


if __name__ == "__main__":
    sys.exit(main())
