"""Where a model's formats lose, and what its keys look like, as a page can hold it."""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantpage.evaluate.heads import HeadErrors, LayerKeys

PICTURE_BYTES = 240_000
"""Of all pictures of keys together, compressed and in base64: a page is read by mail, too."""
_FEWEST = 8
"""Tokens of a picture, at least; before it would have fewer, heads go without."""
_LEVELS = 15
STAGES = ("plain", "rotated", "mapped")


def as_grids(found: HeadErrors) -> dict[str, Any]:
    """Layers by kv_heads, keys and values apart; None where a layer has no codes."""
    return {
        half: {str(layer): [float(f"{each:.3g}") for each in row] for layer, row in rows.items()}
        for half, rows in (("keys", found.keys), ("values", found.values))
    }


def as_pictures(layers: Sequence[LayerKeys]) -> dict[str, Any]:
    """|K| of every head, token by channel, as few tokens as PICTURE_BYTES need.

    Numbers are cut to 16 levels of a stage's largest; a page inflates them with the browser's own
    DecompressionStream.
    """
    heads = []
    most = layers[0].plain.shape[1] if layers else 0
    for rows in [*range(most, _FEWEST, -4), min(most, _FEWEST)]:
        heads = [_head(each, head, rows) for each in layers for head in range(each.plain.shape[0])]
        if sum(len(each["data"]) for each in heads) <= PICTURE_BYTES:
            break
    return {
        "tokens": heads[0]["tokens"] if heads else 0,
        "channels": layers[0].plain.shape[2] if layers else 0,
        "heads": [{k: v for k, v in each.items() if k != "tokens"} for each in heads],
    }


def fewer(pictures: dict[str, Any], spare: int) -> dict[str, Any]:
    """Without the heads of the smallest outliers, so that -``spare`` bytes less are taken."""
    heads = sorted(pictures["heads"], key=lambda each: max([0, *(x for _, x in each["outliers"])]))
    while heads and spare < 0:
        # What stands around a picture's numbers counts, too.
        spare += len(json.dumps(heads.pop(0), separators=(",", ":")))
    kept = sorted(heads, key=lambda each: (each["layer"], each["head"]))
    return {**pictures, "heads": kept}


def _head(layer: LayerKeys, head: int, rows: int) -> dict[str, Any]:
    at = torch.linspace(0, layer.plain.shape[1] - 1, rows, device="cpu").long()
    levels, largest = [], []
    for stage in STAGES:
        numbers = getattr(layer, stage)[head][at].abs()
        largest.append(float(f"{float(numbers.max()):.3g}"))
        levels.append(_levels(numbers))
    packed = zlib.compress(_packed(torch.cat(levels)), 9)
    return {
        "layer": layer.layer,
        "head": head,
        "tokens": rows,
        "outliers": [[channel, float(f"{times:.3g}")] for channel, times in layer.outliers(head)],
        "map_in_use": layer.map_in_use,
        "largest": largest,
        "data": base64.b64encode(packed).decode(),
    }


def _levels(numbers: Float[Tensor, "tokens channels"]) -> Int[Tensor, " numbers"]:
    # Square roots: what is small beside an outlier stays visible.
    share = (numbers / numbers.max().clamp_min(1e-30)).sqrt()
    return (share * _LEVELS).round().to(torch.uint8).flatten()


def _packed(levels: Int[Tensor, " numbers"]) -> bytes:
    """Two a byte, the first in the low half; an odd one has a zero beside it."""
    if len(levels) % 2:
        levels = torch.cat([levels, levels.new_zeros(1)])
    return (levels[0::2] | (levels[1::2] << 4)).numpy().tobytes()
