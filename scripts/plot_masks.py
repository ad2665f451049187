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

OURS, THEIRS = ("flash_mask", "attend"), ("FlexAttention bf16", "attend")


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/h200-masks.csv")
    target = Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images/h200-masks.png")
    with source.open() as file:
        rows = list(csv.DictReader(file))
    found = {
        (row["implementation"], row["part"], row["kind"], int(row["tokens"])): float(row["tflops"])
        for row in rows
    }
    sizes = sorted({n for each, part, _, n in found if (each, part) == OURS and n <= 32768})
    figure, axes = plt.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.6), sharey=True)
    for axis, size in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        kinds = [k for each, part, k, n in found if (each, part, n) == (*OURS, size)][::-1]
        at = range(len(kinds))
        ours = [found[(*OURS, kind, size)] for kind in kinds]
        theirs = [found.get((*THEIRS, kind, size)) for kind in kinds]
        both = all(each is not None for each in theirs)
        axis.barh(
            [y + 0.2 * both for y in at],
            ours,
            0.4 if both else 0.7,
            color="#2c7bb6",
            label="flash_mask, int8 pages",
        )
        if both:
            axis.barh(
                [y - 0.2 for y in at], theirs, 0.4, color="#fdae61", label="FlexAttention, bf16"
            )
        axis.set_yticks(list(at), kinds)
        axis.set_xlabel("TFLOP/s of visible pairs")
        axis.set_title(f"{size} tokens, {rows[0]['device']}")
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(target, dpi=110)
    print(target)


if __name__ == "__main__":
    main()
