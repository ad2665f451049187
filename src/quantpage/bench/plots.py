"""Pictures of CSV rows, and of nothing else: what is drawn was measured and is committed.

The roofline: time against the bytes that a decode must read, one line a format, and the copy
bandwidth as the limit. The bars: times of each case, a colour a format.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

COLOURS = {
    "none": "#8a8f98",
    "bf16 dense": "#b9bdc4",
    "fp8": "#2f7ed8",
    "int8": "#1a9850",
    "int8_static": "#74c476",
    "int4": "#d9480f",
    "k8v4": "#9c36b5",
}


def read_rows(path: Path, op: str = "decode", head_dim: int = 128) -> list[dict[str, str]]:
    """Rows of one op and width, of the shape that most cases have: 32 query heads, pages of 64, one
    new token in decode. Of several that read one format the fastest.
    """
    best: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] != op or int(row["head_dim"]) != head_dim:
                continue
            if (row["q_heads"], row["page_size"]) != ("32", "64"):
                continue
            if op == "decode" and row["new"] != "1":
                continue
            key = (row["case"], row["format"])
            if key not in best or float(row["microseconds"]) < float(best[key]["microseconds"]):
                best[key] = row
    if not best:
        raise ValueError(f"{path}: expected rows of {op} with head_dim {head_dim}, found none")
    return list(best.values())


def draw_roofline(source: Path, target: Path) -> None:
    """Time against bytes, both logarithmic; the line is the copy bandwidth of the same run."""
    import matplotlib.pyplot as plt

    rows = read_rows(source)
    copy = median(float(r["tb_per_s"]) / float(r["of_copy"]) for r in rows)
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    sizes = [float(r["bytes"]) for r in rows]
    ends = [min(sizes) / 2, max(sizes) * 2]
    label = f"copy bandwidth, {copy:.2f} TB/s"
    axes.plot(ends, [b / copy / 1e6 for b in ends], color="black", lw=1, ls="--", label=label)
    for name in sorted({r["format"] for r in rows}):
        mine = sorted((float(r["bytes"]), float(r["microseconds"])) for r in _of(rows, name))
        axes.plot(*zip(*mine, strict=True), "o-", ms=5, label=name, color=COLOURS.get(name))
    axes.set(xscale="log", yscale="log", xlabel="bytes of the cache", ylabel="microseconds a layer")
    axes.set_title(f"Decode on an {rows[0]['device']}: codes and scales read once", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)
    plt.close(figure)


def draw_bars(source: Path, target: Path) -> None:
    """A group of bars a case, the cases that every format was timed on first."""
    import matplotlib.pyplot as plt

    rows = read_rows(source)
    names = sorted({r["format"] for r in rows}, key=lambda n: list(COLOURS).index(n))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    cases.sort(key=lambda case: -len([r for r in rows if r["case"] == case]))
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    width = 0.8 / len(names)
    for at, name in enumerate(names):
        times = {r["case"]: float(r["microseconds"]) for r in _of(rows, name)}
        places = [i + at * width for i, case in enumerate(cases) if case in times]
        heights = [times[case] for case in cases if case in times]
        bars = axes.bar(places, heights, width * 0.92, label=name, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], cases)
    axes.set(yscale="log", ylabel="microseconds a layer")
    axes.set_title(f"Decode, requests x context, {rows[0]['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=len(names))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)
    plt.close(figure)


def _of(rows: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    return [row for row in rows if row["format"] == name]
