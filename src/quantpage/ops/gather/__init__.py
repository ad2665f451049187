"""Pages to dense rows: export, foreign attention, prefill workspaces."""

import torch

from quantpage.cache.views import QuantizedPages
from quantpage.formats import KVFormat
from quantpage.hardware import device_info
from quantpage.ops import refusals
from quantpage.ops.dispatch import Call, Implementation, find
from quantpage.ops.rows import Cached, PageTable

__all__ = ["CANDIDATES", "gather"]


CANDIDATES: list[Implementation] = [
    Implementation("triton", "quantpage.ops.gather.triton:gather_request", refusals.GATHER_TRITON),
    Implementation("cpu", "quantpage.ops.gather.cpu:gather_request", refusals.CPU),
    Implementation("torch", "quantpage.ops.gather.reference:gather_request", refusals.NOTHING),
]
"""In order of preference."""


def gather(
    pages: QuantizedPages,
    page_table: PageTable,
    context_len: int,
    dtype: torch.dtype,
    implementation: Implementation | str | None = None,
) -> Cached:
    """The first ``context_len`` keys or values of one request, dequantized.

    pages: one half of a layer. Rows are in the basis of the cache. implementation: as in
    ``ops.attend.attend``. Raises ValueError for what does not belong together.
    """
    if not isinstance(implementation, Implementation):
        heads, width = pages.kv_heads, pages.head_dim
        both = KVFormat("of these pages", pages.spec, pages.spec)
        where = device_info(pages.codes.device)
        call = Call(where, both, dtype, heads, heads, width, width, pages.page_size)
        implementation = find(CANDIDATES, call, implementation)
    return implementation.load()(pages, page_table, context_len, dtype)
