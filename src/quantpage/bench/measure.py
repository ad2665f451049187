"""How a kernel is timed: many layers in one CUDA graph, each with its own cache.

The layers together are larger than the second-level cache, so that each one is read from memory;
one graph holds them all, so that the timer's own cost is divided among them.
"""

import csv
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

COLD_BYTES = 400_000_000
"""What the layers of a graph read together: several times an H200's 60 MB of L2."""

L2_BYTES = 2**28
"""More than any L2: filled before a call that is to find nothing there."""
GRAPH_CALLS = 32
"""Calls in a timed graph, at least: the layers of a model's step."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    op: str
    case: str
    implementation: str
    format: str
    requests: int
    new: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    microseconds: float
    """Of one layer, everything it launches included."""
    bytes: int
    """Codes and scales that must be read (decode), or all that must be read and written."""
    tb_per_s: float
    of_copy: float
    """Share of the copy bandwidth measured in the same run."""
    error: float
    """|out - exact| / |exact| against float64 over the same cache."""
    timing: str
    device: str
    torch: str
    triton: str
    commit: str


@cache
def current_commit() -> str:
    """Short hash of the checkout, empty outside one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def environment() -> dict[str, str]:
    """What a row says of the machine and the software."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "-"
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": current_commit() or "-",
    }


def graph_microseconds(run: Callable[[], None], calls: int, repeats: int = 9) -> float:
    """Median time of one of the ``calls`` that ``run`` makes, over replays of a CUDA graph that
    holds GRAPH_CALLS of them or more; compiled and captured first.

    Fewer, and the launch of the graph itself (5 to 8 us) would be a part of the call: a model's
    step has tens of layers in a graph.
    """
    run()
    torch.cuda.synchronize()
    turns = max(1, -(-GRAPH_CALLS // calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            run()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times) / (turns * calls)


def graph_us(run: Callable[[], object]) -> float:
    """Median time of replays of ``run`` in a CUDA graph, L2 cleared before each."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    others = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times = [_replay_us(graph, others)]
    # About 60 ms in all, at least three.
    times += [_replay_us(graph, others) for _ in range(min(200, max(3, int(6e4 / times[0]))))]
    return statistics.median(times[1:])


def _replay_us(graph: torch.cuda.CUDAGraph, others: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    others.zero_()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_bandwidth() -> float:
    """TB/s, bytes read and written, of a large copy on this device."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        target.copy_(source)

    run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 2 * source.nbytes / (statistics.median(times) * 1e-3) / 1e12


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """A new CSV file of ``rows``."""
    write_table([asdict(row) for row in rows], path, [f.name for f in fields(Row)])


def write_table(
    rows: Sequence[Mapping[str, object]], path: Path, columns: Sequence[str] | None = None
) -> None:
    """A new CSV file of records that have the same keys, or a subset of ``columns``; the file is
    there whole or as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


class RowPrinter:
    """Rows on stdout as they are measured, in columns under one header."""

    def __init__(self, **widths: int) -> None:
        """``widths``: of each field that is printed, in order; negative: to the right."""
        self._widths = widths
        self._started = False

    def __call__(self, row: Mapping[str, object]) -> None:
        """Print one row, and before the first of them the header."""
        if not self._started:
            self._line({name: name.replace("microseconds", "us") for name in self._widths})
            self._started = True
        self._line(row)

    def _line(self, row: Mapping[str, object]) -> None:
        cells = []
        for name, width in self._widths.items():
            value = row[name]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(text.ljust(width) if width > 0 else text.rjust(-width))
        print(" ".join(cells).rstrip(), flush=True)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted| / |wanted| in float64."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
