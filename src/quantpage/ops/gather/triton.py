"""Pages to dense 16-bit rows, one launch for many spans of many requests.

Prefill reads a dequantized workspace instead of pages (it costs about 300 / (chunk * group) of the
attention that follows). Spans let a capped workspace be looped: each names a request, a
range of its keys and the row of the workspace where they go.
"""

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.hardware import E4M3, device_info
from quantpage.ops.checks import gathers
from quantpage.ops.gather.triton_kernel import gather_kernel
from quantpage.ops.operand import NO_SCALES, STATIC, Operand, halves, read
from quantpage.ops.rows import Cached, PageTable


def tile_of(width: int) -> int:
    """Keys a tile, for rows of ``width`` channels, a power of two: a tile is held in registers."""
    return 32 if width <= 256 else 16


def gather_rows(
    pages: QuantizedPages,
    page_table: Int[Tensor, "requests max_pages"],
    spans: Int[Tensor, "spans 5"],
    max_span_keys: int,
    out: Float[Tensor, "heads rows head_dim"],
    first_head: int = 0,
) -> None:
    """Write the keys of every span into ``out``, dequantized, in the basis of the cache.

    spans: int32 (request, first_key, keys_to_write, visible_end, out_row) on the device; a negative
    request is skipped. Keys from visible_end on, and keys of pages that the table does not have
    (-1), become 0. max_span_keys: host bound of keys_to_write. Heads first_head .. are written.
    Numbers saturate at the finite range of ``out``; unquantized ones that are not finite stay so.
    """
    _launch((read(pages), None), page_table, spans, max_span_keys, (out, None), first_head)


def gather_layer(
    layer: LayerKV,
    page_table: Int[Tensor, "requests max_pages"],
    spans: Int[Tensor, "spans 5"],
    max_span_keys: int,
    outs: tuple[Tensor, Tensor],
    first_head: int = 0,
) -> None:
    """A workspace: ``gather_rows`` of keys and of values, in one launch where they are alike.

    Values are finite, since a matrix product takes 0 times NaN to rows that do not see it. A value
    that was not, as unquantized pages may hold, makes its key NaN: of scores a mask selects. Values
    whose scales are given stay codes (operand.dense_operand says why).
    """
    key, value = halves(layer)
    at = (page_table, spans, max_span_keys)
    if _alike((layer.key, layer.value), outs) and value.scales not in (NO_SCALES, STATIC):
        _launch((key, value), *at, outs, first_head)
        return
    _launch((key, None), *at, (outs[0], None), first_head)
    marks = outs[0] if value.scales == NO_SCALES else None
    _launch((value._replace(scales=_kept(value)), None), *at, (outs[1], None), first_head, marks)


def _kept(value: Operand) -> int:
    """Scales that a workspace's values are multiplied by."""
    return NO_SCALES if value.scales == STATIC else value.scales


def _alike(halves: tuple[QuantizedPages, QuantizedPages], outs: tuple[Tensor, Tensor]) -> bool:
    """Whether one set of strides and codes serves both halves."""

    def facts(pages: QuantizedPages, out: Tensor):
        planes = (pages.codes, pages.scale, pages.zero, out)
        shapes = [None if p is None else (p.dtype, p.shape, p.stride()) for p in planes]
        # Addresses that differ in their alignment would be compiled apart.
        return pages.spec, shapes, [p is not None and p.data_ptr() % 16 == 0 for p in planes]

    return facts(halves[0], outs[0]) == facts(halves[1], outs[1])


def _launch(
    halves: tuple[Operand, Operand | None],
    page_table: Tensor,
    spans: Tensor,
    max_span_keys: int,
    outs: tuple[Tensor, Tensor | None],
    first_head: int,
    marks: Tensor | None = None,
) -> None:
    """halves: the second is alike in everything but its addresses. marks: the rows of keys that are
    to be NaN where a value is not finite.
    """
    if spans.shape[0] == 0 or max_span_keys <= 0:
        return
    out, (half, too) = outs[0], halves
    heads = out.shape[0] * (1 if too is None else 2)
    width = triton.next_power_of_2(half.head_dim)
    tile = tile_of(width)
    gather_kernel[(spans.shape[0], triton.cdiv(max_span_keys, tile), heads)](
        *half.planes,
        out,
        *(half if too is None else too).planes,
        out if outs[1] is None else outs[1],
        out if marks is None else marks,
        page_table,
        spans,
        *half.strides,
        *half.scale_strides,
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        0 if marks is None else marks.stride(0),
        0 if marks is None else marks.stride(1),
        first_head,
        CODE=half.code,
        HEAD_DIM=half.head_dim,
        WIDTH=width,
        PAGE=half.page_size,
        GROUPS=half.groups,
        SCALES=half.scales,
        ZERO=half.has_zero,
        LIMIT=torch.finfo(out.dtype).max,
        TILE=tile,
        OLD=device_info(out.device).before(E4M3),
        HALVES=1 if too is None else 2,
        MARKS=marks is not None,
        num_warps=4,
    )


@gathers("cuda")
def gather_request(
    pages: QuantizedPages, page_table: PageTable, context_len: int, dtype: torch.dtype
) -> Cached:
    """One request's cached rows, dequantized, in the basis of the cache."""
    out = torch.empty(
        context_len, pages.kv_heads, pages.head_dim, dtype=dtype, device=pages.codes.device
    )
    span = torch.tensor(
        [[0, 0, context_len, context_len, 0]], dtype=torch.int32, device=pages.codes.device
    )
    gather_rows(pages, page_table[None], span, context_len, out.transpose(0, 1))
    return out
