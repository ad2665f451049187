"""Blocks of SmolLM2's shape in the compiled core, by tokens a step: rows for benchmarks/results.

    cpu_rows.py --out FILE [--base LIBRARY] [--weights bf16 int8] [--tokens 1 4 8 16 32 64 128]

Projections and second halves of 30 blocks, without attention, beside a plain read of their weights
and the products alone by torch (int8 weights: dequantized a layer at a time). A library of another
commit (libquantpage_cpu.so, which must have the same records) takes turns with this one's.
Milliseconds of processor time, one thread, medians.
"""

import argparse
import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from serve_speed import device

from quantpage import cpu_core
from quantpage.cpu_core.products import Matrix, Norm, Projection, SecondHalf

WIDTH, HEADS, INNER, BLOCKS = 576, 192, 1536, 30
SHAPES = (
    *((WIDTH, WIDTH), (HEADS, WIDTH), (HEADS, WIDTH), (WIDTH, WIDTH)),
    *((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
)
COLUMNS = (
    "weights", "tokens", "core_ms", "base_ms", "torch_ms", "read_ms", "threads", "turns", "base",
    "commit", "device", "torch",
)  # fmt: skip


def matrix(rows: int, width: int, weights: str) -> Matrix:
    """Random numbers."""
    numbers = torch.randn(rows, width) * width**-0.5
    if weights == "bf16":
        return Matrix(numbers.bfloat16())
    scale = (numbers.abs().amax(1) / 127).bfloat16()
    return Matrix((numbers / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


def by_torch(matrices: list[list[Matrix]], tokens: int) -> None:
    """The products alone."""
    x, y = torch.randn(tokens, WIDTH).bfloat16(), torch.randn(tokens, INNER).bfloat16()
    for block in matrices:
        for weight, scale, _ in block:
            given = x if weight.shape[1] == WIDTH else y
            out = torch.nn.functional.linear(given, weight.to(torch.bfloat16))
            if scale is not None:
                out *= scale


@torch.inference_mode()
def timed(weights: str, tokens: int, given: argparse.Namespace) -> dict[str, str]:
    """Medians over turns."""
    torch.manual_seed(0)
    norm = Norm(torch.ones(WIDTH).bfloat16(), 1e-5)
    matrices = [[matrix(*shape, weights) for shape in SHAPES] for _ in range(BLOCKS)]
    blocks = [
        (Projection(m[:3], norm), SecondHalf((m[3], m[4], m[5], m[6]), norm)) for m in matrices
    ]
    x = torch.randn(tokens, WIDTH).bfloat16()

    def by_core() -> None:
        for first, second in blocks:
            assert first.serves(x.dtype) and second.serves(x.dtype)
            first(x)
            second(x, x)

    def read() -> None:
        for block in matrices:
            for each in block:
                cpu_core.core().read(each.weight.data_ptr(), each.weight.nbytes, 1)

    runs: dict[str, tuple[Path | None, Callable[[], None]]] = {
        "core_ms": (None, by_core),
        "torch_ms": (None, lambda: by_torch(matrices, tokens)),
        "read_ms": (None, read),
    }
    if given.base:
        runs["base_ms"] = given.base, by_core
    own = Path(cpu_core.__file__).parent / "libquantpage_cpu.so"
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.turns + 1):
        for name, (library, run) in runs.items():
            # Opened outside of what is timed.
            cpu_core.use_library(library or own)
            cpu_core.core()
            begin = time.process_time()
            run()
            if turn:
                taken[name].append((time.process_time() - begin) * 1e3)
    return {name: f"{statistics.median(each):.2f}" for name, each in taken.items()}


def main() -> None:
    """Rows to the CSV, behind those that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a library of another commit")
    parser.add_argument("--base-commit", default="")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
    facts = {"threads": 1, "turns": given.turns, "base": given.base_commit, "commit": commit}
    facts |= {"device": device(), "torch": torch.__version__}
    new = not given.out.exists()
    with given.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        for weights in given.weights:
            for tokens in given.tokens:
                row = {"weights": weights, "tokens": tokens, **timed(weights, tokens, given)}
                writer.writerow(row | facts)
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
