"""How time is taken: of a kernel in a CUDA graph, of a call on a CPU.

On a GPU many layers stand in one graph, each with its own cache. Together they are larger than the
second-level cache, so that each is read from memory; one graph holds them all, so that the timer's
own cost is divided among them.

On a CPU the clock of one thread is the process's own; that of more is the wall's, and a sample
during which the system took a core away (an involuntary context switch) is disturbed.
"""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from quantpage.cuda_graphs import GraphPool

COLD_BYTES = 400_000_000
"""What the layers of a graph read together: several times an H200's 60 MB of L2."""

L2_BYTES = 2**28
"""More than any L2: filled before a call that is to find nothing there."""
GRAPH_CALLS = 32
"""Calls in a timed graph, at least: the layers of a model's step."""


class Timing(NamedTuple):
    """Of the samples that nothing disturbed; of the three fastest, where fewer are left."""

    best: float
    median: float
    undisturbed: int
    samples: int


Clock = Callable[[], float]


def cpu_clock() -> Clock:
    """Seconds, for torch's number of threads."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Sample(NamedTuple):
    """One look at the clock."""

    seconds: float
    quiet: bool


def sample(run: Callable[[], object], clock: Clock) -> Sample:
    """One call of ``run``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = clock()
    run()
    taken = clock() - start
    lost = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    return Sample(taken, clock is time.process_time or not lost)


def timing(samples: Sequence[Sample]) -> Timing:
    """What samples of one thing say."""
    quiet = [each.seconds for each in samples if each.quiet]
    kept = quiet if len(quiet) >= 3 else sorted(each.seconds for each in samples)[:3]
    return Timing(min(kept), statistics.median(kept), len(quiet), len(samples))


def graph_microseconds(run: Callable[[], None], calls: int) -> float:
    """Median time of one of the ``calls`` that ``run`` makes, over replays of a CUDA graph that
    holds GRAPH_CALLS of them or more; compiled and captured first.

    Fewer, and the launch of the graph itself (5 to 8 us) would be a part of the call: a model's
    step has tens of layers in a graph.
    """
    turns = max(1, -(-GRAPH_CALLS // calls))

    def layers() -> None:
        for _ in range(turns):
            run()

    graph, _ = GraphPool().capture(layers)
    graph.replay()
    torch.cuda.synchronize()
    times = [milliseconds(graph.replay) for _ in range(9)]
    return statistics.median(times) * 1e3 / (turns * calls)


def cold_microseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` in a CUDA graph, with nothing of its own in L2: replays of one call,
    for steps that are too large to stand in a graph many times.
    """
    graph, _ = GraphPool().capture(run)
    others = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def replay() -> float:
        others.zero_()
        return milliseconds(graph.replay)

    first = replay()
    # About 60 ms in all, at least three.
    times = [replay() for _ in range(min(200, max(3, int(60 / first))))]
    return statistics.median(times) * 1e3


def milliseconds(run: Callable[[], object]) -> float:
    """One call, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """TB/s, bytes read and written, of a large copy on this device."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        target.copy_(source)

    run()
    times = [milliseconds(run) for _ in range(7)]
    return 2 * 2 * source.nbytes / (statistics.median(times) * 1e-3) / 1e12
