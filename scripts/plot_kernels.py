"""docs/images/h200-decode.png and h200-prefill.png, from benchmarks/results alone.

usage: python scripts/plot_kernels.py
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS, IMAGES = Path("benchmarks/results"), Path("docs/images")
COLOURS = {"none": "#888888", "int8": "#1f77b4", "fp8": "#2ca02c", "int4": "#d62728"}
LABELS = {"none": "none (bf16)"}


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def decode() -> None:
    """Time against the bytes that must be read: one line a format, the copy as the limit."""
    rows = [row for row in read("h200-decode-sweep.csv") if row["op"] == "decode"]
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    best: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        point = float(row["megabytes"]), float(row["microseconds"])
        case = best.setdefault(row["format"], {})
        if row["case"] not in case or point[1] < case[row["case"]][1]:
            case[row["case"]] = point
    copy = float(rows[0]["copy_tb_per_s"])
    span = [5, 3000]
    axis.plot(span, [x / copy for x in span], "k--", lw=1, label=f"copy, {copy:.2f} TB/s")
    for name, cases in best.items():
        points = sorted(cases.values())
        axis.plot(
            *zip(*points, strict=True), "o-", color=COLOURS[name], label=LABELS.get(name, name)
        )
    for case, (x, y) in best["int8"].items():
        axis.annotate(case, (x, y), xytext=(6, -10), textcoords="offset points", fontsize=8)
    axis.set(
        xscale="log", yscale="log", xlabel="codes and scales that must be read, MB",
        ylabel="microseconds a layer, merge included",
        title="Decode, 32 query heads, 8 kv_heads, head_dim 128, page_size 64 (H200)",
    )  # fmt: skip
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(IMAGES / "h200-decode.png", dpi=130)


def prefill() -> None:
    """Bars: TFLOP/s of each implementation, a group a shape."""
    rows = [row for row in read("h200-prefill.csv") if row["error"] or row["pairs"] == "all"]
    cases = list(dict.fromkeys(row["case"] for row in rows if "dim" not in row["case"]))
    bars = [
        ("cuDNN", "bf16", "#444444"),
        ("FlashAttention-2", "bf16", "#aaaaaa"),
        ("gluon", "int8", COLOURS["int8"]),
        ("gluon", "fp8", COLOURS["fp8"]),
        ("gluon", "int4", COLOURS["int4"]),
        ("triton", "int8", "#9ec9e8"),
    ]
    found = {(r["case"], r["implementation"], r["format"]): float(r["tflops"]) for r in rows}
    figure, axis = plt.subplots(figsize=(10, 4.4))
    for index, (implementation, name, colour) in enumerate(bars):
        heights = [found.get((case, implementation, name), 0.0) for case in cases]
        where = [at + (index - 2.5) * 0.14 for at in range(len(cases))]
        axis.bar(where, heights, 0.13, color=colour, label=f"{implementation}, {name}")
    axis.set_xticks(range(len(cases)), cases)
    axis.set(ylabel="TFLOP/s", title="Prefill, 32 query heads, 8 kv_heads, head_dim 128 (H200)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(IMAGES / "h200-prefill.png", dpi=130)


if __name__ == "__main__":
    decode()
    prefill()
