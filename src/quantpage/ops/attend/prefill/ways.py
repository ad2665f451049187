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

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, derive
from quantpage.ops.dispatch import DECODE_TOKENS

WORKSPACE_ROWS = {"gluon": 256, "triton": 384}
"""Least rows of a request that are worth a workspace, by the kernel that reads it."""


@dataclass(frozen=True, slots=True)
class Ways:
    """A step's requests by the way they are computed; None: all requests."""

    workspace: tuple[int, ...] | None = ()
    pages: tuple[int, ...] | None = ()
    decode: tuple[int, ...] = ()


def choose_ways(query_lens: tuple[int, ...], group: int, kernel: str, decodes: bool) -> Ways:
    """How each request with new tokens is computed.

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


def take_requests(batch: BatchPlan, members: tuple[int, ...]) -> tuple[BatchPlan, Tensor]:
    """The step of ``members`` alone, and the rows of their tokens in the whole step."""
    device = str(batch.query_starts.device)
    chosen, rows, starts = _taken(batch.query_lens, members, device)
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
        torch.tensor(members, dtype=torch.int64).to(device),
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(starts, dtype=torch.int32).to(device),
    )
