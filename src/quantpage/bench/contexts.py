"""Decode against context on this device, beside the bandwidth of reading alone: a report's speed.

One request, one new token, one layer; functions, gates and clocks are those of bench/cpu and
bench/decode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpage.bench import cpu, decode
from quantpage.bench.cases import Case, cache_bytes
from quantpage.bench.timing import copy_bandwidth
from quantpage.cpu_core import absence, find_core
from quantpage.errors import Unavailable
from quantpage.formats import FORMATS
from quantpage.hardware import device_info
from quantpage.ops.attend import AttendParams

_SECONDS = 1.0
"""Of each context on a CPU, about."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 64

    def case(self, context: int) -> Case:
        """One request of so many tokens."""
        shape = (self.q_heads, self.kv_heads, self.head_dim, self.page_size)
        return Case(1, context, (), 1, *shape)


@dataclass(frozen=True, slots=True)
class Timed:
    """Attention of one new token over a layer's cache."""

    format: str
    context: int
    microseconds: float
    bytes: int
    """Codes and scales, read once."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """All of one device."""

    rows: tuple[Timed, ...]
    gb_per_s: float
    """Measured in the same run, on a CPU at the longest context."""
    limit: str
    """What was measured for it, in words."""
    device: str
    threads: int


def time_decode(
    device: torch.device,
    heads: Heads,
    formats: Sequence[str],
    contexts: Sequence[int],
) -> Speeds:
    """Time formats of FORMATS at each context; results are checked before anything is timed.

    Raises Unavailable where there is no compiled core on a CPU.
    """
    known = [name for name in formats if name in FORMATS and FORMATS[name].dynamic]
    if device.type == "cuda":
        rows, gb_per_s = _on_gpu(heads, known, contexts)
        limit = "a large copy, bytes read and written"
    else:
        rows, gb_per_s = _on_cpu(heads, known, contexts)
        limit = "reading as many bytes and nothing else"
    info = device_info(device)
    return Speeds(tuple(rows), gb_per_s, limit, info.name, torch.get_num_threads())


def _on_cpu(
    heads: Heads, formats: Sequence[str], contexts: Sequence[int]
) -> tuple[list[Timed], float]:
    if find_core() is None:
        raise Unavailable(absence())
    rows, read = [], 0.0
    for context in sorted(contexts):
        case = heads.case(context)
        codes = 2 * context * heads.kv_heads * heads.head_dim
        layers = max(1, min(16, cpu.ROTATED_BYTES // codes))
        q = torch.randn(1, heads.q_heads, heads.head_dim, dtype=torch.bfloat16)
        params, sizes, found = AttendParams(heads.head_dim**-0.5), {}, {}
        for name in formats:
            cpu.gate(name, case)
            made = [cpu.random_layer(name, case) for _ in range(layers)]
            sizes[name] = cache_bytes(made[0][0])
            found[name] = cpu.reader_of(made, q, params)
        taken = cpu.measure(found | {"read": cpu.bytes_alone(codes, layers)}, _SECONDS)
        # The last one's counts, whose layers are the largest: those of a short context lie in a
        # processor's own caches.
        read = codes / taken["read"].median / 1e9
        rows += [
            Timed(name, context, taken[name].median * 1e6, size) for name, size in sizes.items()
        ]
    return rows, read


def _on_gpu(
    heads: Heads, formats: Sequence[str], contexts: Sequence[int]
) -> tuple[list[Timed], float]:
    copy = copy_bandwidth()
    rows = []
    for context in contexts:
        case = heads.case(context)
        for name in formats:
            for row in decode.measure(case, name, copy, timed=True):
                rows.append(Timed(name, context, row.microseconds, row.bytes))
    return rows, copy * 1e3
