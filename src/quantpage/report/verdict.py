"""What a report's figures say, in words: which format to take, and why.

Rules, and nothing else. A format is

    indistinguishable   it changes predictions no more than bfloat16 arithmetic does, which is what
                        models are served in (without that yardstick: mean KL up to 1e-3, and no
                        more than 2 of 100 tokens)
    close               mean KL up to 1e-2, and at most 6 of 100 tokens are others
    visible             mean KL up to 1e-1
    broken              more than that

Shares of tokens are taken with twice their standard error in the format's favour, so that a few
predictions decide nothing. Taken is the format of fewest bytes among the best that there are.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from quantpage.report.costs import CONTEXT, curve_of, held_bits

LEVELS = ("indistinguishable", "close", "visible", "broken")
_MEAN_KL = {"indistinguishable": 1e-3, "close": 1e-2, "visible": 1e-1}
_OTHERS = {"indistinguishable": 0.02, "close": 0.06, "visible": 1.0}
LAYER_FACTOR, LAYER_LEAST = 3.0, 0.02
"""A layer is named where a head's error is so many times the median layer's, and at least this."""
_GROWTH = 2.0
"""Error grows with position where the last third's KL is so many times the middle third's."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The top of the page."""

    take: str
    """The format."""
    headline: str
    reasons: tuple[str, ...]
    levels: Mapping[str, str]
    """Format -> one of LEVELS."""
    flag: str
    """To copy."""


def level_of(row: Mapping[str, Any], yardstick: Mapping[str, Any] | None) -> str:
    """How far a format's predictions are from the unquantized ones."""
    others = max(0.0, 1 - row["top1"] - 2 * row["top1_error"])
    limits = dict(_MEAN_KL), dict(_OTHERS)
    if yardstick is not None:
        limits[0]["indistinguishable"] = yardstick["kl_mean"]
        limits[1]["indistinguishable"] = 1 - yardstick["top1"]
    for level in LEVELS[:-1]:
        if row["kl_mean"] <= limits[0][level] and others <= limits[1][level]:
            return level
    return LEVELS[-1]


def judge(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report's figures."""
    rows, yardstick = report["fidelity"]["rows"], report["fidelity"]["yardstick"]
    quantized = [row for row in rows if row["bits"] < 16] or list(rows)
    levels = {row["format"]: level_of(row, yardstick) for row in rows}
    best = min(LEVELS.index(levels[row["format"]]) for row in quantized)
    among = [row for row in quantized if LEVELS.index(levels[row["format"]]) == best]
    take = min(among, key=lambda row: (row["bytes_per_token"], row["kl_mean"]))
    level = LEVELS[best]
    if level == "broken":
        return Verdict(
            "none",
            "Leave this model's cache unquantized, or calibrate it: every format changes what it "
            "says.",
            (_words_of(take, level, yardstick), *_layers(report, take["format"])),
            levels,
            "--kv-format none",
        )
    reasons = [_words_of(take, level, yardstick), _saved(report, take["format"])]
    smaller = [row for row in quantized if row["bytes_per_token"] < take["bytes_per_token"]]
    reasons += [_step_down(row, take, levels[row["format"]]) for row in smaller]
    reasons += _between(report, take, yardstick)
    cheapest = min(quantized, key=lambda row: row["bytes_per_token"])["format"]
    reasons += [*_drift(report, take["format"]), *_needles(report), *_layers(report, cheapest)]
    name, than = take["format"], "it cannot be told from 16 bits"
    if yardstick is not None:
        than = "it changes less than bfloat16 arithmetic itself does"
    headline = {
        "indistinguishable": f"Take {name}: on this model {than}.",
        "close": f"Take {name}: no smaller format stays as close to 16 bits.",
        "visible": f"Take {name} only if memory decides: what it changes can be noticed.",
    }[level]
    return Verdict(
        name,
        headline,
        tuple(each for each in reasons if each),
        levels,
        f"--kv-format {shlex.quote(name)}",
    )


def per_hundred(row: Mapping[str, Any]) -> str:
    """'1.0 ± 0.4 of 100 tokens'."""
    return f"{100 * (1 - row['top1']):.1f} \N{PLUS-MINUS SIGN} {200 * row['top1_error']:.1f} of 100"


def _words_of(row: Mapping[str, Any], level: str, yardstick: Mapping[str, Any] | None) -> str:
    said = (
        f"{row['format']}: another token would come first for {per_hundred(row)}; mean KL "
        f"{row['kl_mean']:.1e} nats"
    )
    if yardstick is None:
        return f"{said}."
    than = "no more than" if level == "indistinguishable" else "beside"
    return (
        f"{said}: {than} what bfloat16 arithmetic itself changes "
        f"({100 * (1 - yardstick['top1']):.1f} of 100, {yardstick['kl_mean']:.1e})."
    )


def _saved(report: Mapping[str, Any], name: str) -> str:
    memory = report["memory"]
    row = next((each for each in memory["rows"] if each["format"] == name), None)
    if row is None:
        return ""
    at = memory["contexts"].index(CONTEXT)
    share = row["request_bytes"][at] / memory["unquantized"][at]
    return (
        f"A request of {CONTEXT:,} tokens holds {row['request_bytes'][at] / 2**20:,.1f} MiB, "
        f"{share:.0%} of what Transformers' own cache holds."
    )


def _step_down(row: Mapping[str, Any], take: Mapping[str, Any], level: str) -> str:
    less = 1 - row["bytes_per_token"] / take["bytes_per_token"]
    costs = {
        "close": f"loses {per_hundred(row)} tokens",
        "visible": f"loses {per_hundred(row)} tokens, which can be noticed",
        "broken": f"breaks this model: {per_hundred(row)} tokens are others",
    }
    said = costs.get(level, f"loses {per_hundred(row)} tokens")
    return f"{row['format']} would save another {less:.0%} and {said}."


def _between(
    report: Mapping[str, Any], take: Mapping[str, Any], yardstick: Mapping[str, Any] | None
) -> list[str]:
    """A choice a layer that takes less than the format and is expected to stay as close."""
    limit = _MEAN_KL["indistinguishable"] if yardstick is None else yardstick["kl_mean"]
    bits = held_bits(report)[take["format"]]
    fewer = [
        each
        for each in curve_of(report)
        if each["bits"] < 0.95 * bits and each["loss"] <= limit and "," in each["line"]
    ]
    if not fewer or take["kl_mean"] > limit:
        return []
    best = min(fewer, key=lambda each: each["bits"])
    return [
        f"A format a layer may do with {1 - best['bits'] / bits:.0%} less: "
        f"--kv-format {shlex.quote(best['line'])}, expected KL {best['loss']:.1e} (a sum of parts; "
        "measure it with --formats)."
    ]


def _drift(report: Mapping[str, Any], name: str) -> list[str]:
    found = report["position"]["kl"].get(name)
    if not found or len(found) < 6:
        return []
    # Not from the beginning: there a format with exact pages has no codes to read.
    third = len(found) // 3
    first, last = (sum(part) / third for part in (found[third : 2 * third], found[-third:]))
    edges = report["position"]["edges"]
    start, end = edges[third], edges[-1]
    if first <= 0:
        return []
    if last > _GROWTH * first:
        return [
            f"The error of {name} grows with the text: from {first:.1e} to {last:.1e} nats between "
            f"tokens {start:,} and {end:,}. Look at longer texts before you trust it there."
        ]
    return [f"The error of {name} does not grow between tokens {start:,} and {end:,}."]


def _needles(report: Mapping[str, Any]) -> list[str]:
    found = report["needle"]["found"]
    exact = found.get("unquantized", [])
    hit = [at for at, each in enumerate(exact) if each["right"]]
    if not hit:
        return []
    lost = {
        name: sum(not rows[at]["right"] for at in hit)
        for name, rows in found.items()
        if name != "unquantized"
    }
    losing = [f"{name} loses {count}" for name, count in lost.items() if count]
    count = f"the {len(hit)} of {len(exact)} needles that the model finds"
    if not losing:
        return [f"Every format finds {count} unquantized."]
    return [f"Of {count} unquantized, {', '.join(losing)}."]


def _layers(report: Mapping[str, Any], name: str) -> list[str]:
    """Layers whose keys lose much more than the others', with their outlier channels."""
    grid = report["heads"]["errors"].get(name, {}).get("keys", {})
    if len(grid) < 3:
        return []
    worst = {layer: max(row) for layer, row in grid.items()}
    middle = median(worst.values())
    far = sorted(
        (layer for layer in worst if worst[layer] > max(LAYER_FACTOR * middle, LAYER_LEAST)),
        key=lambda layer: -worst[layer],
    )[:3]
    said = []
    for layer in far:
        head = max(range(len(grid[layer])), key=grid[layer].__getitem__)
        channels = outliers_in_words(report["heads"]["pictures"]["heads"], int(layer), head)
        said.append(
            f"Layer {layer}, head {head} loses {worst[layer] / middle:.0f} times as much by "
            f"{name}'s keys as the median layer{channels}."
        )
    if said:
        numbers = ",".join(sorted(far, key=int))
        # A name that has rules already is not given more.
        line = "" if "," in name else f", or --kv-format {name},layers={numbers}:int8"
        said.append(f"Calibrate the model (quantpage calibrate){line}, and look again.")
    return said


def outliers_in_words(heads: Sequence[Mapping[str, Any]], layer: int, head: int) -> str:
    """'; its keys have outliers in channels 12 and 44', or nothing."""
    for each in heads:
        if (each["layer"], each["head"]) == (layer, head) and each["outliers"]:
            numbers = [str(channel) for channel, _ in each["outliers"][:4]]
            if len(numbers) == 1:
                return f"; its keys have an outlier in channel {numbers[0]}"
            return (
                f"; its keys have outliers in channels {', '.join(numbers[:-1])} and {numbers[-1]}"
            )
    return ""
