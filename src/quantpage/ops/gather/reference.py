"""Pages to dense rows: the true statement."""

import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.cache.views import QuantizedPages
from quantpage.formats import dequantize
from quantpage.ops.checks import gathers
from quantpage.ops.rows import Cached, PageTable


@gathers(None)
def gather_request(
    pages: QuantizedPages, page_table: PageTable, context_len: int, dtype: torch.dtype
) -> Cached:
    """One request's cached rows, dequantized, in the basis of the cache."""
    used = page_table[: -(-context_len // pages.page_size)].long()
    codes = take_pages(pages.codes, used)
    scale, zero = (_of_pages(plane, used, pages) for plane in (pages.scale, pages.zero))
    rows = dequantize(codes, scale, zero, pages.spec, dtype)
    return rows.transpose(1, 2).flatten(0, 1)[:context_len]


def _of_pages(
    plane: Tensor | None, used: Int[Tensor, " pages"], pages: QuantizedPages
) -> Tensor | None:
    """A scale or zero that broadcasts over [pages, kv_heads, page_size, groups]."""
    if plane is None:
        return None
    return plane[used] if pages.spec.dynamic else plane[:, None]


def take_pages(plane: Tensor, used: Int[Tensor, " pages"]) -> Tensor:
    """``plane[used]``; torch does not index every 8-bit dtype, so those go as bytes."""
    if plane.dtype == torch.float8_e4m3fn:
        return plane.view(torch.uint8)[used].view(plane.dtype)
    return plane[used]
