"""Which recipe should a format be? Candidates, measured by dense fake quantization.

    python scripts/compare_recipes.py --model models/smollm2 --csv FILE \
        --text ~/.cache/quantpage/austen.txt

One forward a window: keys and values are round-tripped through formats/quantize inside a dense
attention, which sees exact keys where the candidate's rule says so. Because that rule depends on
positions alone, one forward gives what generation through a cache would give. FORMATS are
measured through the real cache by `quantpage evaluate`.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from quantpage.evaluate.score import Scores, Window, cut_windows
from quantpage.formats import CODES, Granularity, QuantSpec, dequantize, quantize, rotate
from quantpage.integrations.hf_transformers.loading.model import load_model

PAGE = 64
QUERY_TILE = 256


@dataclass(frozen=True)
class Recipe:
    name: str
    key: QuantSpec
    value: QuantSpec
    recent: int = 0
    """Pages seen exactly, the query's own counted; the first page too. 0: none."""


def spec(code: str, group: int | None = None, zero: bool = False, turned: bool = False):
    rotation = "hadamard" if turned else "none"
    return QuantSpec(CODES[code], Granularity(group), zero_point=zero, rotation=rotation)


def recipes() -> list[Recipe]:
    keys = {
        "int8": spec("int8"),
        "int8 zero": spec("int8", zero=True),
        "int8 rotated": spec("int8", turned=True),
        "int8 rotated zero": spec("int8", zero=True, turned=True),
        "int8 rotated groups of 32": spec("int8", 32, turned=True),
        "fp8": spec("fp8"),
        "fp8 rotated": spec("fp8", turned=True),
        "int4 zero": spec("int4", zero=True),
        "int4 rotated": spec("int4", turned=True),
        "int4 rotated zero": spec("int4", zero=True, turned=True),
        "int4 rotated groups of 32": spec("int4", 32, turned=True),
    }
    eight = [Recipe(f"{name}", each, each) for name, each in keys.items() if "int4" not in name]
    mixed = ("int8 rotated", "int4 rotated zero")
    pairs = [Recipe(" / ".join(mixed), keys[mixed[0]], keys[mixed[1]])]
    four = [Recipe(name, each, each) for name, each in keys.items() if "int4" in name]
    found = eight + pairs
    for recent in (1, 2):
        for each in [eight[2], *pairs, *four]:
            found.append(Recipe(each.name, each.key, each.value, recent))
    return found


def round_trip(x: Tensor, how: QuantSpec) -> Tensor:
    turned = rotate(x) if how.rotation == "hadamard" else x
    seen = dequantize(*quantize(turned, how), how)
    return rotate(seen) if how.rotation == "hadamard" else seen


CURRENT: list[Recipe] = []
"""The recipe that attention follows; empty: none."""


def attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Dense causal attention, tile by tile of queries."""
    group = query.shape[1] // key.shape[1]
    tokens = query.shape[2]
    halves = [(key, value)]
    if CURRENT:
        recipe = CURRENT[0]
        halves.append((round_trip(key, recipe.key), round_trip(value, recipe.value)))
    halves = [[x.repeat_interleave(group, 1) for x in half] for half in halves]
    positions = torch.arange(tokens)
    out = torch.empty_like(query)
    for start in range(0, tokens, QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, tokens))
        end = rows.stop
        own, page = positions[rows, None] // PAGE, positions[None, :end] // PAGE
        coded = torch.zeros(len(own), end, dtype=torch.bool)
        if CURRENT:
            recent = CURRENT[0].recent
            coded = (page > own - recent) | (page == 0) if recent else coded
            coded = ~coded
        scores = query[:, :, rows] @ halves[0][0][:, :, :end].mT
        if CURRENT:
            scores = torch.where(coded, query[:, :, rows] @ halves[1][0][:, :, :end].mT, scores)
        hidden = positions[None, :end] > positions[rows, None]
        weights = (scores * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, :, rows] = torch.where(coded, 0.0, weights) @ halves[0][1][:, :, :end]
        if CURRENT:
            out[:, :, rows] += torch.where(coded, weights, 0.0) @ halves[1][1][:, :, :end]
    return out.transpose(1, 2), None


@torch.inference_mode()
def log_probabilities(model, window: Window) -> Tensor:
    out = model(window.tokens, use_cache=False, logits_to_keep=window.scored + 1)
    return out.logits[0, :-1].log_softmax(-1)


def measure(model, windows: list[Window], found: list[Recipe]) -> list[Scores]:
    scores = [Scores() for _ in found]
    for number, window in enumerate(windows, 1):
        CURRENT.clear()
        exact = log_probabilities(model, window)
        for recipe, each in zip(found, scores, strict=True):
            print(f"window {number} of {len(windows)}: {recipe.name}", file=sys.stderr)
            CURRENT[:] = [recipe]
            each.add(window, exact, log_probabilities(model, window))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--scored", type=int, default=1536)
    chosen = parser.parse_args()
    model, tokenizer = load_model(chosen.model, torch.float32)
    AttentionInterface.register("recipes", attention)
    AttentionMaskInterface.register("recipes", lambda *_, **__: None)
    model.set_attn_implementation("recipes")
    text = chosen.text.read_text(encoding="utf-8")
    windows = cut_windows(tokenizer, text, chosen.windows, chosen.prompt, chosen.scored)
    found = recipes()
    head_dim = model.config.head_dim
    columns = "keys_and_values,bits_key,bits_value,exact_recent_pages,kl_mean,kl_p99,top1,"
    columns += "perplexity,tokens,page_size,head_dim,model,text,dtype,torch"
    measured = measure(model, windows, found)
    with chosen.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns.split(","))
        for recipe, scores in zip(found, measured, strict=True):
            bits = [each.bits_per_value(head_dim) for each in (recipe.key, recipe.value)]
            figures = (scores.mean_divergence, scores.p99_divergence, scores.top1)
            writer.writerow(
                [recipe.name, *bits, recipe.recent]
                + [f"{each:.4g}" for each in (*figures, scores.perplexity)]
                + [scores.tokens, PAGE, head_dim, Path(chosen.model).name, chosen.text.name]
                + ["float32", torch.__version__]
            )


if __name__ == "__main__":
    main()
