"""Every causal and image-text class of Transformers, tiny and random, attached and not.

    python scripts/sweep_models.py --out benchmarks/results/models.csv    # all: ten minutes
    python scripts/sweep_models.py --only llama,gemma3 -v           # some, with what went wrong

A class is built from its configuration, shrunk by the names of its numbers. What it says unattached
with eager attention is compared with what it says attached: a prompt, chunks and single tokens
through a cache, a left-padded batch, beams and prompt lookup with format ``none``; and with int8,
where the control rounds keys and values as they go into Transformers' own cache. A class is a
forked process with a time limit.

    python scripts/sweep_models.py --out benchmarks/results/models.csv --document docs/models.md
"""

import argparse
import copy
import csv
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto import modeling_auto as auto

import quantpage
from quantpage.errors import PartlyPaged, UnsupportedModel
from quantpage.formats import FORMATS, dequantize, quantize, rotate
from quantpage.integrations.hf_transformers.modules.arguments import cache_as

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.tiny_classes import build

LISTS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
START, END = "<!-- sweep -->", "<!-- end of sweep -->"
VERDICTS = ("kernels", "partly", "dense", "refused", "wrong", "silent", "late error", "not tried")
PROMPT, NEW, PAD = 40, 6, 7
CLOSE, CLOSE_ROUNDED = 2e-3, 0.1
"""Relative errors of logits in float32: what a router's near tie may add, and what eight bits whose
codes flip do over a few layers. Attention that is wrong is off by tens of percent."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of one class."""

    kind: str
    model_type: str
    name: str
    verdict: str
    coverage: str = ""
    error: float = 0.0
    """Largest relative error of logits with format none, over all ways to run it."""
    int8_error: float = 0.0
    """The same with int8, whose control rounds as well: codes that flip."""
    skipped: str = ""
    """Ways that the class does not run unattached either."""
    why: str = ""


def tokens(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (rows, length), generator=generator)


@torch.no_grad()
def stepwise(model, new_cache=None):
    """Logits of a prompt, a chunk and single tokens through one cache, and the cache."""
    ids, found = tokens(2, PROMPT + 9, 3), []
    cache = DynamicCache(config=model.config) if new_cache is None else new_cache()
    ends = [PROMPT, PROMPT + 5, *range(PROMPT + 6, PROMPT + 10)]
    for start, end in zip([0, *ends], ends, strict=False):
        mask = torch.ones(2, end, dtype=torch.long)
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask,
            use_cache=True,
            **cache_as(model, cache),
        )
        found.append(out.logits)
    return torch.cat(found, 1), cache


@torch.no_grad()
def generated(model, ids, mask, **arguments):
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, output_logits=True, return_dict_in_generate=True, **arguments,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def ways(given=None):
    """name -> run of a model; each returns (tokens, logits). given: more arguments of generate."""
    ids, repeated = tokens(2, PROMPT, 5), tokens(1, 10, 6).repeat(1, 4)
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[0, :PAD] = 0
    pads = ids.masked_fill(padded == 0, 0)
    return {
        "batch": lambda model: generated(model, ids, ones, **(given or {})),
        "left padding": lambda model: generated(model, pads, padded, **(given or {})),
        "beams": lambda model: generated(model, ids, ones, num_beams=2),
        "prompt lookup": lambda model: generated(
            model, repeated, torch.ones_like(repeated), prompt_lookup_num_tokens=3
        ),
    }


def gone(way, model, new_cache=None):
    """(tokens, logits) of a model that goes one way, and the cache that it went through."""
    if way == "steps":
        logits, cache = stepwise(model, new_cache)
        return (None, logits), cache
    if new_cache is None or way in ("beams", "prompt lookup"):
        return ways()[way](model), None
    cache = new_cache()
    return ways(cache_as(model, cache))[way](model), cache


def apart(got, wanted):
    """Relative error of logits, as far as both chose the same tokens."""
    (tokens_got, logits_got), (tokens_wanted, logits_wanted) = got, wanted
    if tokens_got is None:
        return float((logits_got - logits_wanted).norm() / logits_wanted.norm())
    same, prompt = 0, tokens_wanted.shape[1] - len(logits_wanted)
    steps = min(len(logits_got), len(logits_wanted))
    while same < steps:
        same += 1
        at = prompt + same - 1
        if at >= tokens_got.shape[1] or (tokens_got[:, at] != tokens_wanted[:, at]).any():
            break
    got, wanted = logits_got[:same], logits_wanted[:same]
    if got.shape != wanted.shape:
        return float("inf")
    fine = torch.isfinite(wanted)
    return float((got - wanted)[fine].norm() / wanted[fine].norm())


def rounding_cache():
    """Make Transformers' own cache round what it is given, in this process."""
    from transformers import cache_utils

    spec = FORMATS["int8"]

    def seen(x, each):
        turned = rotate(x.float()) if each.rotation == "hadamard" else x.float()
        found = dequantize(*quantize(turned, each), each, torch.float32)
        return (rotate(found) if each.rotation == "hadamard" else found).to(x.dtype)

    for name in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        kind = getattr(cache_utils, name)

        def update(self, key, value, *args, _own=kind.update, **kwargs):
            return _own(self, seen(key, spec.key), seen(value, spec.value), *args, **kwargs)

        kind.update = update


def attached(model, kv_format):
    return quantpage.attach(model, kv_format=kv_format, page_size=16, calibration=None)


def judge(kind, model_type):
    """A Row for one class."""
    name = LISTS[kind][model_type]
    name = name[0] if isinstance(name, (list, tuple)) else name
    base = {"kind": kind, "model_type": model_type, "name": name}
    wanted, error = {}, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(model_type, name)
        except Exception as found:  # noqa: BLE001
            return Row(**base, verdict="not tried", why=said(found))
        refusal = refused(model)
        if refusal:
            return Row(**base, verdict="refused", why=refusal)
        # Each run gets a copy: some models keep positions of their last call.
        for way, run in {"steps": lambda each: (None, stepwise(each)[0]), **ways()}.items():
            # A way that the class does not go unattached says nothing.
            try:
                wanted[way] = run(copy.deepcopy(model))
            except Exception as found:  # noqa: BLE001
                error = error or said(found)
    wanted = {way: each for way, each in wanted.items() if not each[1].isnan().any()}
    base["skipped"] = ", ".join(way for way in ("steps", *ways()) if way not in wanted)
    if not wanted:
        return Row(**base, verdict="not tried", why=error or "its logits are not finite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors, found = {}, None
        try:
            for way in wanted:
                errors[way], tried = None, copy.deepcopy(model)
                with attached(tried, "none") as at:
                    got, _ = gone(way, tried, at.new_cache)
                errors[way] = apart(got, wanted[way])
            tried, way = copy.deepcopy(model), next(iter(wanted))
            with attached(tried, "int8") as at:
                found = way, *gone(way, tried, at.new_cache), at.coverage
        except Exception as error:  # noqa: BLE001
            place = next((way for way, each in errors.items() if each is None), "int8")
            return Row(**base, verdict="late error", why=f"{place}: {said(error)}")
    told = any(issubclass(each.category, PartlyPaged) for each in caught)
    return compared(base, model, errors, found, told)


def compared(base, model, errors, found, told):
    """The Row of a class that ran: found is its int8 way, what came, cache and coverage."""
    way, quantized, cache, coverage = found
    rounding_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = apart(quantized, gone(way, copy.deepcopy(model))[0])
    base |= {"coverage": str(coverage), "error": max(errors.values()), "int8_error": rounded}
    off = [f"{way} {value:.0e}" for way, value in errors.items() if not value < CLOSE]
    if not rounded < CLOSE_ROUNDED:
        off.append(f"int8 {rounded:.0e}")
    if off:
        return Row(**base, verdict="wrong", why=", ".join(off))
    if not hasattr(cache, "used_bytes") or not cache.used_bytes():
        return Row(**base, verdict="silent", why="nothing in pages")
    if coverage.whole:
        return Row(**base, verdict="kernels")
    if not told:
        return Row(**base, verdict="silent", why=str(coverage))
    verdict = "partly" if coverage.paged else "dense"
    return Row(**base, verdict=verdict, why="; ".join(why for why, _ in coverage.dense))


def refused(model):
    """What attach says where it refuses a model; None where it takes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attached(copy.deepcopy(model), "int8").detach()
    except UnsupportedModel as refusal:
        return str(refusal)
    except Exception:  # noqa: BLE001
        # Whatever else goes wrong is seen where the model is run.
        return None
    return None


def said(error):
    """An error in one line, and where it came from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {first}"


def in_a_process(kind, model_type, limit):
    """``judge`` in a fork, so that nothing that a class does stays."""
    found = forked(lambda: asdict(judge(kind, model_type)), limit)
    if found is None:
        name = str(LISTS[kind][model_type])
        return Row(kind, model_type, name, "not tried", why=f"no answer within {limit} s")
    return Row(**found)


def forked(run, limit):
    """What ``run`` gives in a fork, through JSON; None where ``limit`` seconds are too few."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        found = run()
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    text, end = b"", time.monotonic() + limit
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(read, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(read)
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def read(path):
    """The rows of a table."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["error"], row["int8_error"] = float(row["error"]), float(row["int8_error"])
    return [Row(**row) for row in rows]


def document(rows, path):
    """Write the table of docs/models.md between its marks."""
    counts = [
        f"| {verdict} | " + " | ".join(
            str(sum(r.kind == kind and r.verdict == verdict for r in rows)) for kind in LISTS
        ) + " |"
        for verdict in VERDICTS
    ]  # fmt: skip
    lines = [f"Transformers {transformers.__version__}, {len(rows)} entries.", ""]
    lines += ["| verdict | " + " | ".join(LISTS) + " |", "| --- | --- | --- |", *counts, ""]
    for kind in LISTS:
        whole = sorted(r.model_type for r in rows if r.kind == kind and r.verdict == "kernels")
        lines += [f"**{kind}, on the kernels**: " + ", ".join(whole) + ".", ""]
    lines += ["| entry | verdict | coverage, or why |", "| --- | --- | --- |"]
    for row in sorted(rows, key=lambda r: (VERDICTS.index(r.verdict), r.kind, r.model_type)):
        if row.verdict != "kernels":
            told = row.coverage or row.why
            told = told.replace("|", "\\|").replace("<", "(").replace(">", ")")
            lines.append(f"| {row.kind} {row.model_type} | {row.verdict} | {told} |")
    text = path.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    path.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--out", type=Path, help="CSV to write; rows that it has are kept")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a class")
    parser.add_argument("-v", action="store_true", help="print every row")
    parser.add_argument("--document", type=Path, help="a page to write the rows of --out into")
    arguments = parser.parse_args()
    if arguments.document:
        document(read(arguments.out), arguments.document)
        return False
    torch.set_num_threads(1)
    wanted = arguments.only.split(",") if arguments.only else None
    kept = read(arguments.out) if arguments.out and arguments.out.is_file() else []
    done = []
    for kind, entries in LISTS.items():
        for model_type in entries:
            if wanted is not None and model_type not in wanted:
                continue
            if model_type not in transformers.CONFIG_MAPPING:
                continue
            row = in_a_process(kind, model_type, arguments.limit)
            done.append(row)
            if arguments.v or row.verdict in ("wrong", "silent", "late error"):
                print(f"{row.kind} {row.model_type}: {row.verdict} {row.error:.0e} "
                      f"{row.int8_error:.0e} [{row.coverage}] {row.why} | skipped: {row.skipped}",
                      flush=True)  # fmt: skip
            if arguments.out:
                with arguments.out.open("w", newline="") as file:
                    table = csv.DictWriter(file, [each.name for each in fields(Row)])
                    table.writeheader()
                    again = {(each.kind, each.model_type) for each in done}
                    rows = [each for each in kept if (each.kind, each.model_type) not in again]
                    rows = sorted(rows + done, key=lambda each: (each.kind, each.model_type))
                    table.writerows(asdict(each) for each in rows)
    for verdict in VERDICTS:
        counts = [sum(r.kind == k and r.verdict == verdict for r in done) for k in LISTS]
        print(verdict, *counts)
    return any(row.verdict in ("wrong", "silent", "late error") for row in done)


if __name__ == "__main__":
    sys.exit(main())
