"""Pictures of CSV rows, and of nothing else: what is drawn was measured and is committed.

The roofline: time against the bytes that a decode must read, one line a format, and the copy
bandwidth as the limit. The bars: TFLOP/s of each case or kind of mask, a colour an implementation.
"""

import csv
from collections.abc import Callable, Sequence
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

_PREFILL_BARS = (
    ("cuDNN", "bf16", "#444444"),
    ("FlashAttention-2", "bf16", "#aaaaaa"),
    ("cuDNN after a gather", "bf16 pages", "#777777"),
    ("gluon", "int8", COLOURS["int8"]),
    ("gluon", "fp8", COLOURS["fp8"]),
    ("gluon", "int4", COLOURS["int4"]),
    ("triton", "int8", "#9ec9e8"),
)
"""Implementation and format as the CSV names them, and a colour."""
_OURS = "flash_mask"
_MASK_BARS = {
    _OURS: ("flash_mask, int8 pages, gather and planner included", "#2c7bb6"),
    "FlexAttention bf16": ("FlexAttention, bf16", "#fdae61"),
}
"""Implementation as the CSV names it -> what it is called, and a colour."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of decode in the shape that most cases have: one new token, 32 query heads of 128
    channels, pages of 64. Of several that read one format the fastest. ValueError for none.
    """
    shape = {"op": "decode", "new": "1", "q_heads": "32", "head_dim": "128", "page_size": "64"}
    best: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if any(row[name] != value for name, value in shape.items()):
                continue
            key = (row["case"], row["format"])
            if key not in best or float(row["microseconds"]) < float(best[key]["microseconds"]):
                best[key] = row
    if not best:
        raise ValueError(f"{path}: expected rows of {shape}, found none")
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


def draw_prefill(source: Path, target: Path) -> None:
    """TFLOP/s of each implementation, a group of bars a shape; only shapes of head_dim 128."""
    import matplotlib.pyplot as plt

    rows = [row for row in _read(source) if row["tflops"]]
    cases = list(dict.fromkeys(row["case"] for row in rows if "dim" not in row["case"]))
    found = {(r["case"], r["implementation"], r["format"]): float(r["tflops"]) for r in rows}
    figure, axis = plt.subplots(figsize=(10, 4.4))
    for index, (implementation, name, colour) in enumerate(_PREFILL_BARS):
        heights = [found.get((case, implementation, name), 0.0) for case in cases]
        where = [at + (index - (len(_PREFILL_BARS) - 1) / 2) * 0.12 for at in range(len(cases))]
        axis.bar(where, heights, 0.11, color=colour, label=f"{implementation}, {name}")
    axis.set_xticks(range(len(cases)), cases)
    axis.set(ylabel="TFLOP/s", title="Prefill, 32 query heads, 8 kv_heads, head_dim 128 (H200)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


def draw_masks(source: Path, target: Path) -> None:
    """TFLOP/s of every kind of mask, and FlexAttention beside it where the file has it."""
    import matplotlib.pyplot as plt

    rows = [row for row in _read(source) if row["part"] == "attend"]
    found = {
        (row["implementation"], int(row["tokens"]), row["kind"]): float(row["tflops"])
        for row in rows
        if row["implementation"] in _MASK_BARS
    }
    kinds = list(dict.fromkeys(kind for *_, kind in found))[::-1]
    # Only some kinds are measured at the longest size.
    sizes = sorted({n for _, n, _ in found if all((_OURS, n, kind) in found for kind in kinds)})
    width = 2 + 4 * len(sizes)
    figure, axes = plt.subplots(1, len(sizes), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        drawn = [who for who in _MASK_BARS if any((who, size, kind) in found for kind in kinds)]
        height = 0.8 / len(drawn)
        for at, who in enumerate(drawn):
            label, colour = _MASK_BARS[who]
            places = [y + 0.4 - (at + 0.5) * height for y in range(len(kinds))]
            speeds = [found.get((who, size, kind), 0.0) for kind in kinds]
            axis.barh(places, speeds, height, color=colour, label=label)
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set(xlabel="TFLOP/s of visible pairs", title=f"{size:,} tokens, {rows[0]['device']}")
        axis.grid(axis="x", alpha=0.3)
    named = {
        label: bars
        for axis in axes[0]
        for bars, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_agents(source: Path, target: Path) -> None:
    """Seconds to the first token by round, a line a server."""
    import matplotlib.pyplot as plt

    rows = [row for row in _read(source) if row["case"] == "agents"]
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for name in dict.fromkeys(row["server"] for row in rows):
        mine = [row for row in rows if row["server"] == name]
        rounds = [int(row["round"]) for row in mine]
        axis.plot(rounds, [float(row["first_s"]) for row in mine], marker="o", label=name)
    axis.set(
        xlabel="round",
        ylabel="seconds to the first token, median",
        title=f"{rows[0]['clients']} users, {rows[0]['note'].partition(';')[0]}",
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "h200-decode": draw_roofline,
    "h200-prefill": draw_prefill,
    "h200-masks": draw_masks,
    "cpu-serve-agents": draw_agents,
}
"""The pictures of the docs: NAME.csv of the results -> NAME.png, by this function."""


def _read(source: Path) -> list[dict[str, str]]:
    with source.open(newline="") as file:
        return list(csv.DictReader(file))


def _of(rows: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    return [row for row in rows if row["format"] == name]
