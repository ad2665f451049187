"""docs/images/h200-decode.png and h200-prefill.png, from benchmarks/results alone.

usage: python scripts/plot_kernels.py
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from quantpage.bench.plots import COLOURS, draw_roofline

RESULTS, IMAGES = Path("benchmarks/results"), Path("docs/images")


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def prefill() -> None:
    """Bars: TFLOP/s of each implementation, a group a shape."""
    rows = [row for row in read("h200-prefill.csv") if row["tflops"]]
    cases = list(dict.fromkeys(row["case"] for row in rows if "dim" not in row["case"]))
    bars = [
        ("cuDNN", "bf16", "#444444"),
        ("FlashAttention-2", "bf16", "#aaaaaa"),
        ("cuDNN after a gather", "bf16 pages", "#777777"),
        ("gluon", "int8", COLOURS["int8"]),
        ("gluon", "fp8", COLOURS["fp8"]),
        ("gluon", "int4", COLOURS["int4"]),
        ("triton", "int8", "#9ec9e8"),
    ]
    found = {(r["case"], r["implementation"], r["format"]): float(r["tflops"]) for r in rows}
    figure, axis = plt.subplots(figsize=(10, 4.4))
    for index, (implementation, name, colour) in enumerate(bars):
        heights = [found.get((case, implementation, name), 0.0) for case in cases]
        where = [at + (index - (len(bars) - 1) / 2) * 0.12 for at in range(len(cases))]
        axis.bar(where, heights, 0.11, color=colour, label=f"{implementation}, {name}")
    axis.set_xticks(range(len(cases)), cases)
    axis.set(ylabel="TFLOP/s", title="Prefill, 32 query heads, 8 kv_heads, head_dim 128 (H200)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(IMAGES / "h200-prefill.png", dpi=130)


if __name__ == "__main__":
    draw_roofline(RESULTS / "h200-decode.csv", IMAGES / "h200-decode.png")
    prefill()
