"""The main charts as PNG files, for slides and mails: drawn by matplotlib, as the benches' are."""

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from quantpage import console
from quantpage.bench.plots import COLOURS
from quantpage.files import write_bytes

_MORE = ("#0868ac", "#2a9d8f", "#c77700", "#7d3cb5", "#9a6b3f", "#3d6b1f")


def draw(report: Mapping[str, Any], page: Path) -> list[Path]:
    """Write NAME-error.png, NAME-position.png and NAME-heads.png beside the page.

    Without matplotlib (the extra ``report``) there are none, and a line says so.
    """
    if find_spec("matplotlib") is None:
        console.note("no pictures: they need pip install 'quantpage[report]'")
        return []
    drawn = []
    for name, figure in (
        ("error", _error(report)), ("position", _position(report)), ("heads", _heads(report))
    ):  # fmt: skip
        if figure is not None:
            path = page.with_name(f"{page.stem}-{name}.png")
            write_bytes(path, _as_png(figure))
            drawn.append(path)
    return drawn


def colour_of(name: str, number: int) -> str:
    """The benches' colours for the formats that they know."""
    return COLOURS.get(name, _MORE[number % len(_MORE)])


def _error(report: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows, yardstick = report["fidelity"]["rows"], report["fidelity"]["yardstick"]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        colour, mean = colour_of(row["format"], at), max(row["kl_mean"], 1e-7)
        axes.plot(
            [row["bits"]] * 2, [mean, max(row["kl_p99"], 1e-7)], color=colour, lw=3, alpha=0.4
        )
        axes.plot(row["bits"], mean, "o", color=colour)
        axes.annotate(
            row["format"], (row["bits"], mean), (7, -3), textcoords="offset points", fontsize=9
        )
    if yardstick is not None:
        axes.axhline(yardstick["kl_mean"], color="black", ls="--", lw=1)
        axes.annotate("bfloat16 arithmetic", (11, yardstick["kl_mean"] * 1.15), fontsize=8)
    axes.set(
        yscale="log", xlabel="bits a cached number, scales counted", xlim=(3.5, 17.5),
        ylabel="KL divergence, nats a token",
    )  # fmt: skip
    axes.set_title(
        f"{report['model']['name']}: mean KL, and the worst of 100 tokens "
        f"({rows[0]['tokens']:,} on {report['made']['text']})",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _position(report: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    edges = report["position"]["edges"]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for at, (name, values) in enumerate(report["position"]["kl"].items()):
        floored = [max(each, 1e-7) for each in values]
        axes.plot(middles, floored, "o-", ms=4, label=name, color=colour_of(name, at))
    axes.set(
        yscale="log", xlabel="tokens before the prediction", ylabel="KL divergence, nats a token",
        xlim=(0, None),
    )  # fmt: skip
    axes.set_title(f"{report['model']['name']}: does the error accumulate?", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _heads(report: Mapping[str, Any]) -> Any:
    """Keys above values, of the cheapest format that has both."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    errors = report["heads"]["errors"]
    bits = {row["format"]: row["bits"] for row in report["fidelity"]["rows"]}
    both = [name for name, each in errors.items() if each["keys"] and each["values"]]
    if not both:
        return None
    name = min(both, key=lambda each: bits[each])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, half in zip(figure.subplots(2, 1, sharex=True), ("keys", "values"), strict=True):
        grid = torch.tensor(list(errors[name][half].values()), device="cpu").T.clamp_min(1e-6)
        shown = axes.imshow(grid.numpy(), aspect="auto", cmap="Blues", norm=LogNorm(1e-3, 1))
        axes.set(ylabel=f"head\n({half})")
    axes.set_xlabel("layer")
    figure.colorbar(shown, ax=figure.axes, label="relative error")
    figure.suptitle(f"{report['model']['name']}: attention's output by {name} codes", fontsize=10)
    return figure


def _as_png(figure: Any) -> bytes:
    from io import BytesIO

    out = BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
