"""Two reports beside each other: what was not the same, and what each format gained or lost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantpage.report.charts import Axis, Plot, Series
from quantpage.report.frame import fill
from quantpage.report.schema import check

_CONDITIONS = {
    "model_digest": "model", "text_digest": "text", "dtype": "arithmetic",
    "calibration": "calibration", "page_size": "tokens a page", "device": "device",
    "threads": "threads", "quantpage": "quantpage", "torch": "torch",
    "transformers": "transformers",
}  # fmt: skip
"""Of ``made``: what figures depend on -> what it is called."""
_UNLIKE = ("model_digest", "text_digest")
"""Where these differ, predictions were not of the same thing."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A condition that was not the same."""

    what: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One format in both reports; of each figure what A says, and what B says."""

    format: str
    bits: tuple[float, float]
    bytes_per_token: tuple[float, float]
    kl_mean: tuple[float, float]
    kl_p99: tuple[float, float]
    top1: tuple[float, float]
    overlap: tuple[float, float]
    perplexity: tuple[float, float]
    beyond_noise: bool
    """Whether the shares of same top tokens differ by more than two of their standard errors."""
    microseconds: tuple[float, float] | None
    """Decode of a layer at the longest context that both timed; None: not timed in both."""
    level: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two reports, A and B."""

    differences: tuple[Difference, ...]
    pairs: tuple[Pair, ...]
    """Formats of both, in A's order."""
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Formats that only A has, and only B."""
    take: tuple[str, str]
    same_predictions: bool
    """Whether both were made with the same model on the same text."""
    context: int | None
    """That ``microseconds`` are of."""


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Put two reports' data beside each other; CorruptReport for what is no report."""
    check(a, "A")
    check(b, "B")
    differences = tuple(
        Difference(words, str(a["made"].get(name, "-")), str(b["made"].get(name, "-")))
        for name, words in _CONDITIONS.items()
        if a["made"].get(name) != b["made"].get(name)
    )
    rows = [{row["format"]: row for row in each["fidelity"]["rows"]} for each in (a, b)]
    times = [
        {(row["format"], row["context"]): row["microseconds"] for row in each["speed"]["rows"]}
        for each in (a, b)
    ]
    context = max((key[1] for key in times[0] if key in times[1]), default=None)
    levels = a["verdict"]["levels"], b["verdict"]["levels"]
    pairs = []
    for name, first in rows[0].items():
        second = rows[1].get(name)
        if second is None:
            continue
        error = (first["top1_error"] ** 2 + second["top1_error"] ** 2) ** 0.5
        key = (name, context)
        timed = (times[0][key], times[1][key]) if all(key in each for each in times) else None
        figures = {
            field: (first[field], second[field])
            for field in (
                "bits", "bytes_per_token", "kl_mean", "kl_p99", "top1", "overlap", "perplexity"
            )
        }  # fmt: skip
        pairs.append(
            Pair(
                name,
                **figures,
                beyond_noise=abs(first["top1"] - second["top1"]) > 2 * error,
                microseconds=timed,
                level=(levels[0].get(name, "-"), levels[1].get(name, "-")),
            )
        )
    return Comparison(
        differences,
        tuple(pairs),
        (
            tuple(name for name in rows[0] if name not in rows[1]),
            tuple(name for name in rows[1] if name not in rows[0]),
        ),
        (a["verdict"]["take"], b["verdict"]["take"]),
        all(a["made"][name] == b["made"][name] for name in _UNLIKE),
        context,
    )


def render(found: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The comparison as one HTML file that loads nothing."""
    chart = _plot(found).svg() if found.pairs else ""
    return fill("compare.html", asdict(found) | {"reports": (a, b), "chart": chart})


def _plot(found: Comparison) -> Plot:
    """Mean KL against bits: hollow marks are A's, filled ones B's, joined for each format."""
    series = []
    for number, each in enumerate(found.pairs):
        points = list(zip(each.bits, each.kl_mean, strict=True))
        series.append(Series(each.format, points, number, marked=False, dashed=True))
        series.append(Series(f"{each.format}, A", points[:1], number, hollow=True))
        series.append(Series(f"{each.format}, B", points[1:], number))
        series.append(Series(each.format, points[1:], number, marked=False, named=True))
    top = max(max(each.kl_mean) for each in found.pairs)
    return Plot(
        "Mean KL divergence of each format against its bits a value, in both reports",
        Axis("bits a cached number, scales counted", 3.4, 17, ticks=(4, 6, 8, 10, 12, 14, 16)),
        Axis("KL divergence, nats a token", 1e-7, max(1e-2, 3 * top), log=True),
        series,
    )
