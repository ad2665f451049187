"""Every implementation that runs on a device, on one small step, against float64: what `quantpage
doctor` runs. The tests try far more; this finds an installation that computes something else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache, PagePool, Sequence
from quantpage.explain import OPS, example_call
from quantpage.formats import FORMATS
from quantpage.hardware import DeviceInfo
from quantpage.ops import attend as attend_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend import reference as attend_reference
from quantpage.ops.dispatch import Call, Implementation, Phase
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rope_write.reference import rope_write

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 64, 16
CACHED = (70, 33)
"""Tokens that each request has cached before the step."""
NEW = {"prefill": (40, 21), "decode": (1, 1)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""|out - exact| / |exact|: what the arithmetic of a dtype may lose, several times over. A wrong
page, scale or mask is off by a tenth and more."""
CODES_OFF = 5e-3
"""The same for written rows: a number between two codes may go to either of them, and one in a
hundred may do so."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One implementation of one op on one format."""

    op: str
    implementation: str
    format: str
    error: float
    """|out - exact| / |exact|; infinity where it raised."""
    allowed: float
    said: str = ""
    """What it raised."""

    @property
    def right(self) -> bool:
        """NaN is not."""
        return self.error <= self.allowed


def self_test(device: DeviceInfo) -> Iterator[Tried]:
    """Try everything that serves this device: each op, implementation and dynamic format.

    On one CPU thread: the step is so small that waiting for others would take most of the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _try_all(device)
    finally:
        torch.set_num_threads(threads)


def _try_all(device: DeviceInfo) -> Iterator[Tried]:
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    for kv_format in FORMATS.values():
        if not kv_format.dynamic:
            continue
        call = replace(
            example_call(device, kv_format),
            dtype=dtype, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
            value_head_dim=HEAD_DIM, page_size=PAGE_SIZE,
        )  # fmt: skip
        for op, candidates in OPS.items():
            phase: Phase = "decode" if op.endswith("decode") else "prefill"
            asked = replace(call, phase=phase)
            for each in candidates:
                if not each.refusals(asked):
                    yield _try(op, each, asked)


def _try(op: str, each: Implementation, call: Call) -> Tried:
    allowed = CODES_OFF if op == "rope_write" else TOLERANCE[call.dtype]
    try:
        step = _Step(call)
        run = {"rope_write": step.write_error, "gather": step.gather_error}
        error, said = run.get(op, step.attend_error)(each), ""
    except Exception as raised:  # noqa: BLE001  whatever a broken installation raises is the finding
        error, said = float("inf"), f"{type(raised).__name__}: {raised}"
    return Tried(op, each.name, call.format.name, error, allowed, said)


class _Step:
    """Two requests with tokens in the cache, and a step of new ones."""

    def __init__(self, call: Call, write: Callable[..., Any] = rope_write) -> None:
        """``write``: of the new tokens; those before them are written by the reference."""
        torch.manual_seed(0)
        self.call = call
        device, exact = call.device.kind, call.format.exact_pages is not None
        cache = PagedKVCache(32, 32 if exact else 0, device)
        cache.add_layer(0, CacheLayout(KV_HEADS, HEAD_DIM, call.format, PAGE_SIZE, call.dtype))
        pool, exact_pool = PagePool(32), PagePool(32) if exact else None
        requests = [Sequence(pool, PAGE_SIZE, exact_pool) for _ in CACHED]
        self.layer = cache.layer(0)
        steps: tuple[tuple[tuple[int, ...], Callable[..., Any]], ...] = (
            (CACHED, rope_write),
            (NEW[call.phase], write),
        )
        for new, by in steps:
            for request, count in zip(requests, new, strict=True):
                cache.copy_pages(request.reserve(count))
            self.batch = plan_batch(
                new,
                [each.length + count for each, count in zip(requests, new, strict=True)],
                [each.pages for each in requests],
                PAGE_SIZE,
                device=device,
                exact_tables=[each.exact_pages for each in requests] if exact else None,
            )
            q, k, v = (
                torch.randn(sum(new), heads, HEAD_DIM, device="cpu").to(device, call.dtype)
                for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
            )
            self.q: Tensor = by(q, k, v, self.layer, self.batch, WriteParams()).q
            for request in requests:
                request.commit()

    def write_error(self, each: Implementation) -> float:
        """The new rows, as they are in the pages, and the turned query."""
        other = _Step(self.call, each.load())
        return max(_error(other._gathered(), self._gathered()), _error(other.q, self.q))

    def gather_error(self, each: Implementation) -> float:
        """Both halves of both requests."""
        return _error(self._gathered(each.load(), self.call.dtype), self._gathered())

    def attend_error(self, each: Implementation) -> float:
        """Outputs in the basis of the cache."""
        params = AttendParams(HEAD_DIM**-0.5)
        out, _ = attend_op.attend(self.q, self.layer, self.batch, params, each)
        wanted, _ = attend_reference.attend(self.q.double(), self.layer, self.batch, params)
        return _error(out, wanted)

    def _gathered(
        self, gather: Callable[..., Tensor] = gather_request, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Keys and values of the step's new tokens."""
        lengths = zip(self.batch.query_lens, self.batch.host_context_lens, strict=True)
        found = []
        for row, (new, context) in enumerate(lengths):
            for half in (self.layer.key, self.layer.value):
                found.append(gather(half, self.batch.page_table[row], context, dtype)[-new:])
        return torch.cat(found)


def _error(out: Tensor, wanted: Tensor) -> float:
    """|out - wanted| / |wanted|."""
    exact = wanted.double().cpu()
    return float((out.double().cpu() - exact).norm() / exact.norm())
