"""A report's data as one HTML file: style, script, charts and data inside, nothing to load."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from quantpage.report import heads
from quantpage.report.charts import Axis, Plot, Series, cells, legend
from quantpage.report.costs import curve_of, held_bits
from quantpage.report.frame import fill, part

LIMIT = 500_000
"""Bytes that a page stays below."""
STEPS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Relative errors at which a cell's colour changes."""
_SCALE = ("none", "< 0.1%", "0.1%", "0.3%", "1%", "3%", "10%", "30%", "100%")
_FLOOR = 1e-7
"""KL below it is drawn at the lower edge: that is the noise of sums in float32."""


def render(report: Mapping[str, Any]) -> str:
    """The page. ValueError where it would be larger than ``LIMIT``."""
    shown = dict(report)
    page = fill("page.html", context_of(shown))
    if len(page.encode()) > LIMIT:
        # All of them are in the data beside it.
        kept = heads.fewer(report["heads"]["pictures"], LIMIT - len(page.encode()))
        shown["heads"] = {**report["heads"], "pictures": kept}
        page = fill("page.html", context_of(shown))
    size = len(page.encode())
    if size > LIMIT:
        raise ValueError(
            f"formats: expected few enough for a page of {LIMIT:,} bytes, got one of {size:,}"
        )
    return page


def context_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template asks for beside the data itself."""
    errors, needle, take = report["heads"]["errors"], report["needle"], report["verdict"]["take"]
    map_format = take if take in errors else next(iter(errors), "")
    choices = report["served"]["choices"]
    ops = list(dict.fromkeys(each["op"] for each in choices))
    served = {
        name: [e["chosen"] for op in ops for e in choices if (e["format"], e["op"]) == (name, op)]
        for name in dict.fromkeys(each["format"] for each in choices)
    }
    numbers = numbers_of(report)
    return {
        **report,
        "script": part("page.js"),
        "data": Markup(_embedded(report)),
        "legend": legend(list(numbers.items())),
        "charts": charts_of(report, map_format),
        "curve": curve_of(report),
        "errors": errors,
        "map_format": map_format,
        "steps": list(STEPS),
        "scale": _SCALE,
        "shown": _first_shown(errors.get(map_format, {})),
        "needle_grids": [_needle_grid(name, needle) for name in needle["found"]],
        "widest": max((row["bytes_per_token"] for row in report["memory"]["rows"]), default=1) or 1,
        "times": _times(report["speed"]),
        "gpu": report["speed"].get("limit", "").startswith("a large copy"),
        "served_ops": ops,
        "served_rows": list(served.items()),
        "facts": _facts(report),
    }


def numbers_of(report: Mapping[str, Any]) -> dict[str, int]:
    """Format -> which colour and mark it has in every chart."""
    return {row["format"]: at for at, row in enumerate(report["fidelity"]["rows"])}


def charts_of(report: Mapping[str, Any], map_format: str) -> dict[str, Markup]:
    """Every picture of the page."""
    numbers = numbers_of(report)
    found = {
        "bits": _error_against_bits(report, numbers),
        "others": _others_against_bits(report, numbers),
        "position": _along_the_text(report, numbers),
        "steps": _along_answers(report, numbers),
        "until": _until(report, numbers),
    }
    made = {name: plot.svg() for name, plot in found.items()}
    if report["speed"]["rows"]:
        made["speed"] = _decode(report, numbers).svg()
    errors = report["heads"]["errors"].get(map_format, {"keys": {}, "values": {}})
    grids = [half for by in report["heads"]["errors"].values() for half in by.values()]
    layers = sorted({int(layer) for grid in grids for layer in grid})
    for half in ("keys", "values"):
        made[half] = cells(half, errors[half], layers, STEPS)
    return made


def _error_against_bits(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    rows, yardstick = report["fidelity"]["rows"], report["fidelity"]["yardstick"]
    bits, curve = held_bits(report), curve_of(report)
    line = [(each["bits"], each["loss"]) for each in curve]
    series = [Series("best choice a layer, expected", line, 0, marked=False, dashed=True)]
    series = series if line else []
    series += [
        Series(
            row["format"],
            [(bits[row["format"]], row["kl_mean"])],
            numbers[row["format"]],
            whiskers=[(row["kl_p99"], row["kl_max"])],
            named=True,
        )
        for row in rows
    ]
    top = max(row["kl_max"] for row in rows)
    return Plot(
        "Mean KL divergence of each format against its bits a number",
        _bits_axis(bits),
        Axis("KL divergence, nats a token", _FLOOR, max(1.0, 2 * top), log=True),
        series,
        {} if yardstick is None else {"bfloat16 arithmetic": yardstick["kl_mean"]},
    )


def _others_against_bits(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    rows, yardstick = report["fidelity"]["rows"], report["fidelity"]["yardstick"]
    bits = held_bits(report)

    def others(row: Mapping[str, Any], errors: float = 0.0) -> float:
        return 100 * (1 - row["top1"] + errors * row["top1_error"])

    series = [
        Series(
            row["format"],
            [(bits[row["format"]], others(row))],
            numbers[row["format"]],
            whiskers=[(others(row, 2), others(row, 2))],
            named=True,
        )
        for row in rows
    ]
    top = max(others(row, 2) for row in (*rows, *([yardstick] if yardstick else [])))
    return Plot(
        "Tokens of 100 whose most likely choice is another, against bits a number",
        _bits_axis(bits),
        Axis("other top token, of 100", -0.06 * top, 1.15 * top),
        series,
        {} if yardstick is None else {"bfloat16 arithmetic": others(yardstick)},
    )


def _bits_axis(bits: Mapping[str, float]) -> Axis:
    low, high = min(4.0, *bits.values()) - 0.6, max(16.0, *bits.values()) + 1
    return Axis("bits a number, of all that is held", low, high, ticks=(4, 6, 8, 10, 12, 14, 16))


def _along_the_text(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    edges, kl = report["position"]["edges"], report["position"]["kl"]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    series = [
        Series(name, list(zip(middles, values, strict=True)), numbers[name])
        for name, values in kl.items()
    ]
    return Plot(
        "Mean KL divergence against the position in the text",
        Axis("tokens before the prediction", 0, edges[-1]),
        _kl_axis([value for values in kl.values() for value in values]),
        series,
    )


def _along_answers(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    kl = {name: running_mean(values) for name, values in report["answers"]["kl"].items()}
    series = [
        Series(name, [(at + 1, y) for at, y in enumerate(values)], numbers[name], marked=False)
        for name, values in kl.items()
    ]
    # A mark at the end says which line it is without its colour.
    series += [Series(each.name, [each.points[-1]], each.number, joined=False) for each in series]
    return Plot(
        "Mean KL divergence against the step of the model's own answers",
        Axis("token of the answer", 0, report["answers"]["steps"]),
        _kl_axis([value for values in kl.values() for value in values]),
        series,
    )


def _until(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    steps, count = report["answers"]["steps"], report["answers"]["count"]
    series = []
    for name, until in report["answers"]["until"].items():
        points = [(at, 100 * sum(each >= at for each in until) / count) for at in range(steps + 1)]
        series.append(Series(name, points, numbers[name], marked=False))
        series.append(Series(name, [points[-1]], numbers[name], joined=False))
    return Plot(
        "Share of answers that are the same word for word, against their length",
        Axis("tokens of the answer", 0, steps),
        Axis("answers still the same, %", 0, 104, ticks=(0, 25, 50, 75, 100)),
        series,
    )


def _decode(report: Mapping[str, Any], numbers: Mapping[str, int]) -> Plot:
    speed = report["speed"]
    series, times = [], []
    for name in dict.fromkeys(row["format"] for row in speed["rows"]):
        rows = [row for row in speed["rows"] if row["format"] == name]
        measured = [(row["context"], row["microseconds"]) for row in rows]
        limit = [(row["context"], row["bytes"] / speed["gb_per_s"] / 1e3) for row in rows]
        alone = f"{name}, bytes alone"
        series.append(Series(alone, limit, numbers[name], marked=False, dashed=True))
        series.append(Series(name, measured, numbers[name]))
        times += [time for _, time in measured + limit]
    contexts = sorted({row["context"] for row in speed["rows"]})
    return Plot(
        "Time of attention for one new token against the context, and of reading its bytes alone",
        Axis("tokens in the cache", contexts[0] / 1.3, contexts[-1] * 1.3, True, tuple(contexts)),
        Axis("microseconds a layer", min(times) / 1.5, max(times) * 1.5, log=True),
        series,
    )


def _kl_axis(values: Sequence[float]) -> Axis:
    top = max([*values, _FLOOR * 10])
    return Axis("KL divergence, nats a token", _FLOOR, 2 * top, log=True)


def running_mean(values: Sequence[float], width: int = 8) -> list[float]:
    """Of each value and up to ``width`` - 1 before it."""
    return [
        sum(values[max(0, at + 1 - width) : at + 1]) / min(width, at + 1)
        for at in range(len(values))
    ]


def _first_shown(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[int, int]:
    """The layer and head that lose most by their keys, or by their values."""
    half = errors.get("keys") or errors.get("values") or {}
    found = [(value, int(layer), at) for layer, row in half.items() for at, value in enumerate(row)]
    return max(found)[1:] if found else (0, 0)


def _needle_grid(name: str, needle: Mapping[str, Any]) -> dict[str, Any]:
    places = [(each["depth"], each["length"]) for each in needle["cells"]]
    cell = dict(zip(places, needle["found"][name], strict=True))
    lengths = sorted({length for _, length in places})
    depths = sorted({depth for depth, _ in places})
    return {
        "name": name,
        "lengths": lengths,
        "rows": [(depth, [cell[depth, length] for length in lengths]) for depth in depths],
        "right": sum(each["right"] for each in cell.values()),
        "count": len(cell),
    }


def _times(speed: Mapping[str, Any]) -> dict[str, Any]:
    """Microseconds of each format by context, and the share of the bandwidth at the longest."""
    contexts = sorted({row["context"] for row in speed["rows"]})
    found = {(row["format"], row["context"]): row for row in speed["rows"]}
    rows = []
    for name in dict.fromkeys(row["format"] for row in speed["rows"]):
        last = found[name, contexts[-1]]
        reached = last["bytes"] / last["microseconds"] / 1e3 / speed["gb_per_s"]
        times = [found[name, context]["microseconds"] for context in contexts]
        rows.append((name, {"microseconds": times, "reached": reached}))
    return {"contexts": contexts, "rows": rows}


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    made = report["made"]
    names = {
        "command": "command", "text": "text", "text_digest": "digest of the text",
        "model_digest": "digest of the model", "dtype": "arithmetic", "calibration": "calibration",
        "page_size": "tokens a page", "device": "device", "threads": "threads", "system": "system",
        "torch": "torch", "transformers": "transformers", "quantpage": "quantpage",
        "python": "python", "date": "finished",
    }  # fmt: skip
    return [(words, str(made[name])) for name, words in names.items() if name in made]


def _embedded(report: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(report, separators=(",", ":")).replace("<", "\\u003c")
