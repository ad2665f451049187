"""What a format takes in memory, what fits, who serves it here and how fast: no prediction made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from quantpage.bench.contexts import Heads
from quantpage.cache.sizes import held_bytes, longest_in, unquantized_bytes
from quantpage.errors import FormatError
from quantpage.explain import distinct_refusals, example_call, explain
from quantpage.formats import FORMATS
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import DeviceInfo, available_bytes
from quantpage.integrations.hf_transformers.loading.model import model_shape
from quantpage.integrations.hf_transformers.sizes import cache_shape, calls_of

CONTEXTS = (1024, 8192, 32768, 131072)
CONTEXT = 8192
"""Tokens of the request whose bytes are counted as bits; one of CONTEXTS."""


def memory(
    config: Any, names: Sequence[str], page_size: int, device: torch.device
) -> dict[str, Any]:
    """Bytes of a request at some contexts, and the longest that this device's memory has room
    for, as ``attach`` lays it out for the model in bfloat16; the weights are loaded already."""
    shape = replace(cache_shape(config), dtype=torch.bfloat16)
    free = available_bytes(device)
    rows, base = [], None
    for name in names:
        plans = shape.layers(LayerFormats.parse(name), page_size)
        base = [unquantized_bytes(plans, each) + shape.state_bytes for each in CONTEXTS]
        rows.append(
            {
                "format": name,
                "bytes_per_token": sum(
                    each.layout.bytes_per_token() for each in plans if not each.reach.limited
                ),
                "request_bytes": [held_bytes(plans, each) + shape.state_bytes for each in CONTEXTS],
                "longest": None if free is None else longest_in(plans, free - shape.state_bytes),
            }
        )
    return {"contexts": list(CONTEXTS), "unquantized": base, "free": free, "rows": rows}


def held_bits(report: Mapping[str, Any]) -> dict[str, float]:
    """Format -> bits a number of everything that a request of CONTEXT tokens holds: scales,
    pages kept exact, the unused end of the last page. Caches that are not ours: of the codes.
    """
    memory = report["memory"]
    at = memory["contexts"].index(CONTEXT)
    found = {row["format"]: row["bits"] for row in report["fidelity"]["rows"]}
    return found | {
        row["format"]: 16 * row["request_bytes"][at] / memory["unquantized"][at]
        for row in memory["rows"]
    }


def refusals(config: Any, names: Sequence[str], info: DeviceInfo) -> dict[str, Any]:
    """Who serves each format's ops here, and every refusal once.

    Where layers have heads of several kinds, whoever serves one of them.
    """
    calls = calls_of(config, example_call(info, FORMATS["none"]))
    formats = dict.fromkeys(each for name in names for each in LayerFormats.parse(name).formats)
    choices = [
        choice
        for each in formats
        for call in calls
        for choice in explain(replace(call, format=each))
    ]
    serving: dict[tuple[str, str], dict[str, None]] = {}
    for each in choices:
        serving.setdefault((each.format, each.op), {})[each.chosen or "nothing"] = None
    return {
        "choices": [
            {"format": name, "op": op, "chosen": ", ".join(who)}
            for (name, op), who in serving.items()
        ],
        "refused": [asdict(each) for each in distinct_refusals(choices)],
    }


def timed_contexts(longest: int) -> list[int]:
    """From 512 tokens on, four times as many each."""
    found = [512]
    while found[-1] * 4 <= longest:
        found.append(found[-1] * 4)
    return [each for each in found if each <= longest] or [longest]


def curve_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The advisor's choices with the loss that they are expected to have on this report's text.

    Sums of parts were measured on a shorter text: they are multiplied by what the formats of one
    kind for all layers lost here and there, in between by the bits' share of the way.
    """
    advice, bits = report["advice"], held_bits(report)
    measured = {row["format"]: row["kl_mean"] for row in report["fidelity"]["rows"]}
    known = sorted(
        (bits[each["line"]], math.log(measured[each["line"]] / each["loss"]))
        for each in advice["uniform"]
        if measured.get(each["line"], 0) > 0 < each["loss"]
    )
    if not known:
        return list(advice["curve"])
    at, logs = zip(*known, strict=True)
    factors = np.interp([each["bits"] for each in advice["curve"]], at, logs)
    return [
        {**each, "loss": each["loss"] * math.exp(float(factor))}
        for each, factor in zip(advice["curve"], factors, strict=True)
    ]


def heads_of(config: Any, page_size: int) -> tuple[Heads | None, str]:
    """Heads of the first layer with pages, or why they are not timed."""
    first = next(iter(cache_shape(config).paged.values()))
    if first.head_dim != first.value_head_dim:
        return None, "decode is timed for keys and values of one width; this model's differ"
    q_heads = model_shape(config).q_heads
    return Heads(q_heads, first.kv_heads, first.head_dim, page_size), ""


def check_fit(config: Any, names: Sequence[str], page_size: int) -> None:
    """FormatError where a format does not fit a layer of this model, before anything is loaded."""
    shape = cache_shape(config)
    for name in names:
        try:
            shape.layers(LayerFormats.parse(name), page_size)
        except FormatError as error:
            raise FormatError(f"formats: {name}: {error}") from error
