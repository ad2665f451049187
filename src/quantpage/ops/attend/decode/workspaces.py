"""Memory that decode launches keep: partial results, and counters that each leaves as zeros.

It belongs to a thread, beside the device and the stream: the launches of a step that share it
follow each other, but on one stream another thread's may come between. A captured graph keeps that
of the thread that captured it: two of one thread and stream must not be replayed at the same time,
nor one while that thread launches there.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

COUNTERS = 2**20
"""Counters of a device's pool (4 MB), of which each owner takes its part."""


class Owner(NamedTuple):
    """Whose launches follow each other on the device."""

    device: int | None
    stream: int
    thread: int
    """A thread that ended leaves its memory to the next of its number: what it launched comes
    before."""


_counters: dict[Owner, list[Tensor]] = {}
_pools: dict[int | None, Tensor] = {}
_workspaces: dict[Owner, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
# While a part of a pool is taken.
_taking = threading.Lock()


def owner_of(device: torch.device) -> Owner:
    """The calling thread, on the current stream of ``device``."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return Owner(device.index, stream, threading.get_ident())


def counters_of(device: torch.device, count: int) -> Tensor:
    """Zeros that every launch leaves as zeros, the caller's own.

    They come from a pool that is filled outside of any graph: a graph that was captured with them
    may be replayed before any other. A launch that dies midway, as the device's context does with
    it, is the only one that leaves them otherwise.
    """
    kept = _counters.setdefault(owner_of(device), [])
    if kept and kept[-1].numel() >= count:
        return kept[-1]
    with _taking:
        return _take_counters(device, max(2**14, 1 << (count - 1).bit_length()), kept)


def _take_counters(device: torch.device, size: int, kept: list[Tensor]) -> Tensor:
    pool = _pools.get(device.index)
    if pool is None or pool.numel() < size:
        pool = torch.zeros(max(COUNTERS, size), dtype=torch.int32, device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # Filled by the graph itself, and so of use to this call alone.
                return pool
            torch.cuda.synchronize(device)
    # Smaller ones stay: a captured graph may still count in them.
    kept.append(pool[:size])
    _pools[device.index] = pool[size:]
    return kept[-1]


def piece_sizes(
    programs: int, rows: int, width: int, all_rows: int, whole: bool = False
) -> tuple[int, int, int]:
    """Numbers of each tensor of ``workspace``: two pieces of ``rows`` query rows a program, and one
    for each row that may be whole, where those leave pieces too.
    """
    pieces = 2 * programs + all_rows * whole
    return pieces * rows * width, pieces * rows, 2 * all_rows


def larger(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes that serve both."""
    outs, sums, cuts = (max(pair) for pair in zip(one, other, strict=True))
    return outs, sums, cuts


def counter_count(programs: int, all_rows: int, gather: int) -> int:
    """Counters of a launch whose last program at a row joins ``gather`` pieces; 0 without."""
    return all_rows + 2 * -(-programs // gather) if gather else 0


def workspace(device: torch.device, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Partial outputs and log-sum-exps, two pieces a program (the end of a row that began before,
    the beginning of one that goes on), and where each row's pieces are.
    """
    held = _workspaces.setdefault(owner_of(device), ([], [], []))
    dtypes = (torch.float32, torch.float32, torch.int32)
    for kept, size, dtype in zip(held, sizes, dtypes, strict=True):
        if not kept or kept[-1].numel() < size:
            # Smaller ones stay: a captured graph may still write to them. Each is at least twice
            # the one before, so that all that stay are no more than the last.
            least = 2 * kept[-1].numel() if kept else 0
            kept.append(torch.empty(max(size, least), dtype=dtype, device=device))
    out, lse, cuts = (kept[-1] for kept in held)
    return out, lse, cuts
