"""Which of a prefill step's requests read pages directly, and which through a 16-bit workspace.

A workspace dequantizes each key once and lets the matrix product run at its own pace; reading pages
directly dequantizes once a query tile and writes nothing. What decides is rows = new tokens *
group, as both costs grow with the context alike. Measured on an H200 (int8, page 64, 8 kv_heads of
128; 16k tokens on themselves, and gather alone):

    from pages, portable kernel            240 TFLOP/s    2.1 ps a row, key and head
    over the workspace, portable kernel    377 TFLOP/s    1.4 ps
    over the workspace, Hopper kernel      600 TFLOP/s    0.85 ps, 128 rows at a time
    gather of K and V                                     275 ps a key and head

so that the workspace wins from 275 / (2.1 - 1.4) = 390 rows on for the portable kernel, and from
256 for the Hopper kernel (two tiles). A request of few tokens inside a mixed step is a decode: the
split-KV kernel takes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, derive
from quantpage.cache.views import LayerKV
from quantpage.ops.attend.params import AttendParams, causal_or_full
from quantpage.ops.attend.results import Asked, Results, contiguous, results_for
from quantpage.ops.checks import serves
from quantpage.ops.dispatch import DECODE_TOKENS

WORKSPACE_ROWS = {"gluon": 256, "triton": 384}
"""Least rows of a request that are worth a workspace, by the kernel that reads it."""


@dataclass(frozen=True, slots=True)
class Ways:
    """A step's requests by the way they are computed; None: all requests."""

    workspace: tuple[int, ...] | None = ()
    pages: tuple[int, ...] | None = ()
    decode: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Launches:
    """What computes a step's requests, by the way that they go; each writes into its results."""

    kernel: str
    """A name of WORKSPACE_ROWS."""
    workspace: Callable[..., None]
    """(results, q, layer, batch, params, segment, members; None: all requests)."""
    pages: Callable[..., None]
    """The same."""
    decode: Callable[..., object]
    """(results, q, layer, batch, params): a whole plan, as decode/triton.decode_into takes it."""
    decodes: Callable[..., Any]
    """The entry that says what ``decode`` serves."""


def attend_by_ways(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, by: Launches, asked: Asked
) -> Results:
    """Each request by its way; all write into one output."""
    mask, segment = causal_or_full(params.mask), asked.segment
    results = results_for(
        q, layer.value.head_dim, segment == "all", contiguous(asked.out), asked.lse
    )
    q = q if q.stride(-1) == 1 else q.contiguous()
    ways = Ways(pages=None)
    if segment != "exact":
        decodes = segment == "all" and serves(by.decodes, q, layer, "decode", mask.kind)
        ways = choose_ways(batch.query_lens, q.shape[1] // layer.kv_heads, by.kernel, decodes)
    if ways.workspace != ():
        by.workspace(results, q, layer, batch, params, segment, ways.workspace)
    if ways.decode:
        decode_some(results, q, layer, batch, params, ways.decode, by.decode)
    if ways.pages != () and batch.num_tokens:
        by.pages(results, q, layer, batch, params, segment, ways.pages)
    return results


@lru_cache(maxsize=32)
def choose_ways(query_lens: tuple[int, ...], group: int, kernel: str, decodes: bool) -> Ways:
    """How each request with new tokens is computed; worked out once a step.

    kernel: 'gluon' or 'triton'. decodes: whether the decode kernel serves the call.
    """
    workspace, pages, decode = [], [], []
    for request, new in enumerate(query_lens):
        if not new:
            continue
        if new * group >= WORKSPACE_ROWS[kernel]:
            workspace.append(request)
        elif new <= DECODE_TOKENS and decodes:
            decode.append(request)
        else:
            pages.append(request)
    if not workspace and not decode:
        return Ways(pages=None)
    if not pages and not decode:
        return Ways(workspace=None)
    return Ways(tuple(workspace), tuple(pages), tuple(decode))


def decode_some(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    members: tuple[int, ...],
    decode: Callable[..., object],
) -> None:
    """Some requests of a step by a decode kernel, in place where they are neighbours."""
    taken, rows = batch.once(("requests", members), lambda: take_requests(batch, members))
    if rows is None:
        decode(results, q, layer, taken, params)
        return
    own = q[rows]
    made = results_for(own, results.out.shape[2], True, None, results.lse is not None)
    decode(made, own, layer, taken, params)
    results.out[rows] = made.out
    if results.lse is not None and made.lse is not None:
        results.lse[rows] = made.lse


def take_requests(batch: BatchPlan, members: tuple[int, ...]) -> tuple[BatchPlan, Tensor | None]:
    """The step of ``members`` alone, and the rows of their tokens in the whole step.

    Rows None: nobody between them has new tokens. Such a plan's rows are those of the whole step,
    so that queries and results need not be copied.
    """
    first, end = members[0], members[-1] + 1
    if sum(batch.query_lens[first:end]) == sum(batch.query_lens[r] for r in members):
        parts = {
            "query_starts": batch.query_starts[first : end + 1],
            "context_lens": batch.context_lens[first:end],
            "page_table": batch.page_table[first:end],
        }
        if first:
            # Kernels are compiled for addresses that are multiples of 16 bytes.
            parts = {name: part.clone() for name, part in parts.items()}
        lens = {
            "query_lens": batch.query_lens[first:end],
            "host_context_lens": batch.host_context_lens[first:end],
        }
        return derive(batch, exact=None, first_pages=None, **parts, **lens), None
    chosen, rows, starts = _taken(batch.query_lens, members, str(batch.device))
    taken = derive(
        batch,
        query_starts=starts,
        context_lens=batch.context_lens[chosen],
        page_table=batch.page_table[chosen],
        slots=batch.slots[rows],
        positions=batch.positions[rows],
        query_lens=tuple(batch.query_lens[r] for r in members),
        host_context_lens=tuple(batch.host_context_lens[r] for r in members),
        exact=None,
        first_pages=None,
    )
    return taken, rows


@lru_cache(maxsize=32)
def _taken(
    query_lens: tuple[int, ...], members: tuple[int, ...], device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Requests, rows and query_starts of ``members``: every layer of a step shares them."""
    firsts = [0, *accumulate(query_lens)]
    rows = [t for r in members for t in range(firsts[r], firsts[r + 1])]
    starts = [0, *accumulate(query_lens[r] for r in members)]
    return (
        torch.tensor(members, dtype=torch.int64, device="cpu").to(device),
        torch.tensor(rows, dtype=torch.int64, device="cpu").to(device),
        torch.tensor(starts, dtype=torch.int32, device="cpu").to(device),
    )
