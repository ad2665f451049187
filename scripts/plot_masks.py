"""docs/images/h200-masks.png from benchmarks/results/h200-masks.csv: every kind, and FlexAttention
beside it where the file has it.

python scripts/plot_masks.py [csv] [png]
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "flash_mask", "FlexAttention bf16"
COLOURS = {OURS: "#2c7bb6", THEIRS: "#fdae61"}
LABELS = {
    OURS: "flash_mask, int8 pages, gather and planner included",
    THEIRS: "FlexAttention, bf16",
}


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/h200-masks.csv")
    target = Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images/h200-masks.png")
    with source.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "attend"]
    found = {
        (row["implementation"], int(row["tokens"]), row["kind"]): float(row["tflops"])
        for row in rows
        if row["implementation"] in COLOURS
    }
    kinds = list(dict.fromkeys(kind for *_, kind in found))[::-1]
    # Only some kinds are measured at the longest size.
    sizes = sorted({n for _, n, _ in found if all((OURS, n, kind) in found for kind in kinds)})
    width = 2 + 4 * len(sizes)
    figure, axes = plt.subplots(1, len(sizes), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        drawn = [who for who in COLOURS if any((who, size, kind) in found for kind in kinds)]
        height = 0.8 / len(drawn)
        for at, who in enumerate(drawn):
            places = [y + 0.4 - (at + 0.5) * height for y in range(len(kinds))]
            speeds = [found.get((who, size, kind), 0.0) for kind in kinds]
            axis.barh(places, speeds, height, color=COLOURS[who], label=LABELS[who])
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
    print(target)


if __name__ == "__main__":
    main()
