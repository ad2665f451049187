"""Pages to dense 16-bit rows, one launch for many spans of many requests.

Prefill reads a dequantized workspace instead of pages (it costs about 300 / (chunk * group) of the
attention that follows). Spans let a capped workspace be looped: each names a request, a
range of its keys and the row of the workspace where they go.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.ops.checks import gathers
from quantpage.ops.triton.codes import to_float16

KEYS_A_TILE = 32


@triton.jit(do_not_specialize=["table_row", "first_head", "mark_head", "mark_row"])
def _gather_kernel(
    codes,
    scale,
    zero,
    out,
    codes_too,
    scale_too,
    zero_too,
    out_too,
    marks,
    page_table,
    spans,
    code_page,
    code_head,
    scale_page,
    scale_head,
    table_row,
    out_head,
    out_row,
    mark_head,
    mark_row,
    first_head,
    CODE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ZERO: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
    OLD: tl.constexpr,
    HALVES: tl.constexpr,
    MARKS: tl.constexpr,
):
    span = spans + tl.program_id(0) * 5
    request = tl.load(span)
    first_key = tl.load(span + 1)
    count = tl.load(span + 2)
    visible_end = tl.load(span + 3)
    to_row = tl.load(span + 4)
    head = tl.program_id(2) // HALVES
    if HALVES == 2 and tl.program_id(2) % 2 == 1:
        codes, scale, zero, out = codes_too, scale_too, zero_too, out_too
    offset = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if (request >= 0) & (tl.program_id(1) * TILE < count):
        key = first_key + offset
        seen = (offset < count) & (key < visible_end)
        page = tl.load(page_table + request.to(tl.int64) * table_row + key // PAGE, seen, -1)
        seen &= page >= 0
        page = tl.maximum(page, 0).to(tl.int64)
        slot = key % PAGE
        channel = tl.arange(0, WIDTH)
        inside = channel < HEAD_DIM
        from_head = (first_head + head).to(tl.int64)
        if CODE == 3:
            pair = tl.arange(0, WIDTH // 2)
            rows = codes + page * code_page + from_head * code_head + slot * (HEAD_DIM // 2)
            mask = seen[:, None] & (pair < HEAD_DIM // 2)[None, :]
            number = tl.load(rows[:, None] + pair[None, :], mask, 0)
        else:
            rows = codes + page * code_page + from_head * code_head + slot * HEAD_DIM
            mask = seen[:, None] & inside[None, :]
            number = tl.load(rows[:, None] + channel[None, :], mask, 0)
        if CODE != 0:
            number = to_float16(number, CODE, OLD)
        number = number.to(tl.float32)
        if CODE != 0:
            group = channel // (HEAD_DIM // GROUPS)
            if DYNAMIC:
                plane = page * scale_page + from_head * scale_head + slot * GROUPS
                if GROUPS == 1:
                    own = plane[:, None]
                    mask = seen[:, None]
                else:
                    own = plane[:, None] + group[None, :]
                    mask = seen[:, None] & inside[None, :]
            else:
                own = (from_head * scale_head + group)[None, :]
                mask = inside[None, :]
            number *= tl.load(scale + own, mask, 0.0).to(tl.float32)
            if ZERO:
                number += tl.load(zero + own, mask, 0.0).to(tl.float32)
        if CODE == 0:
            fine = tl.abs(number) < float("inf")
            number = tl.where(fine, tl.minimum(tl.maximum(number, -LIMIT), LIMIT), number)
            if MARKS:
                number = tl.where(fine, number, 0.0)
                bad = seen & (tl.max(fine.to(tl.int32) ^ 1, 1) > 0)
                mark = (to_row + offset).to(tl.int64) * mark_row + head.to(tl.int64) * mark_head
                tl.store(marks + mark, float("nan"), bad)
        else:
            # A key that a mask hides may be a freed page's, whose scale is anything.
            number = tl.where(number == number, number, 0.0)
            if not DYNAMIC:
                # Dynamic scales and zeros of keys that are not seen were loaded as 0.
                number = tl.where(seen[:, None], number, 0.0)
            number = tl.minimum(tl.maximum(number, -LIMIT), LIMIT)
        row = (to_row + offset).to(tl.int64) * out_row + head.to(tl.int64) * out_head
        written = (offset < count)[:, None] & inside[None, :]
        tl.store(out + row[:, None] + channel[None, :], number.to(out.dtype.element_ty), written)


CODE_KINDS = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}
"""A code's number inside kernels."""


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
    _launch(pages, None, page_table, spans, max_span_keys, (out, None), first_head)


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
    that was not, as unquantized pages may hold, makes its key NaN: of scores a mask selects.
    """
    halves = (layer.key, layer.value)
    if not layer.value.spec.quantized:
        _launch(layer.key, None, page_table, spans, max_span_keys, (outs[0], None), first_head)
        _launch(
            layer.value,
            None,
            page_table,
            spans,
            max_span_keys,
            (outs[1], None),
            first_head,
            outs[0],
        )
        return
    if _alike(halves, outs):
        _launch(*halves, page_table, spans, max_span_keys, outs, first_head)
        return
    for half, out in zip(halves, outs, strict=True):
        _launch(half, None, page_table, spans, max_span_keys, (out, None), first_head)


def _alike(halves: tuple[QuantizedPages, QuantizedPages], outs: tuple[Tensor, Tensor]) -> bool:
    """Whether one set of strides and codes serves both halves."""

    def facts(pages: QuantizedPages, out: Tensor):
        planes = (pages.codes, pages.scale, pages.zero, out)
        shapes = [None if p is None else (p.dtype, p.shape, p.stride()) for p in planes]
        # Addresses that differ in their alignment would be compiled apart.
        return pages.spec, shapes, [p is not None and p.data_ptr() % 16 == 0 for p in planes]

    return facts(halves[0], outs[0]) == facts(halves[1], outs[1])


def _launch(
    pages: QuantizedPages,
    too: QuantizedPages | None,
    page_table: Tensor,
    spans: Tensor,
    max_span_keys: int,
    outs: tuple[Tensor, Tensor | None],
    first_head: int,
    marks: Tensor | None = None,
) -> None:
    """too: the other half, alike in everything but its addresses. marks: the rows of keys that are
    to be NaN where a value is not finite.
    """
    if spans.shape[0] == 0 or max_span_keys <= 0:
        return
    out = outs[0]
    spec, width, scale = pages.spec, pages.head_dim, pages.scale
    dynamic = spec.quantized and spec.dynamic
    if scale is None:
        strides = (0, 0)
    elif dynamic:
        strides = (scale.stride(0), scale.stride(1))
    else:
        strides = (0, 0 if scale.shape[0] == 1 else scale.stride(0))
    halves = 1 if too is None else 2
    heads = out.shape[0] * halves
    _gather_kernel[(spans.shape[0], triton.cdiv(max_span_keys, KEYS_A_TILE), heads)](
        *_planes(pages),
        out,
        *(_planes(pages) if too is None else _planes(too)),
        out if outs[1] is None else outs[1],
        out if marks is None else marks,
        page_table,
        spans,
        pages.codes.stride(0),
        pages.codes.stride(1),
        *strides,
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        0 if marks is None else marks.stride(0),
        0 if marks is None else marks.stride(1),
        first_head,
        CODE=CODE_KINDS[spec.code.name],
        HEAD_DIM=width,
        WIDTH=triton.next_power_of_2(width),
        PAGE=pages.page_size,
        GROUPS=1 if scale is None else scale.shape[-1],
        DYNAMIC=dynamic,
        ZERO=pages.zero is not None,
        LIMIT=torch.finfo(out.dtype).max,
        TILE=KEYS_A_TILE,
        OLD=out.is_cuda and torch.cuda.get_device_capability(out.device) < (8, 9),
        HALVES=halves,
        MARKS=marks is not None,
        num_warps=4,
    )


def _planes(pages: QuantizedPages) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes as bytes where Triton has no type for them, scales, zeros."""
    codes = pages.codes
    fp8 = codes.dtype == torch.float8_e4m3fn
    return codes.view(torch.uint8) if fp8 else codes, pages.scale, pages.zero


@gathers("cuda")
def gather_request(
    pages: QuantizedPages,
    page_table: Int[Tensor, " max_pages"],
    context_len: int,
    dtype: torch.dtype,
) -> Float[Tensor, "context kv_heads head_dim"]:
    """One request's cached rows, dequantized, in the basis of the cache."""
    out = torch.empty(
        context_len, pages.kv_heads, pages.head_dim, dtype=dtype, device=pages.codes.device
    )
    span = torch.tensor(
        [[0, 0, context_len, context_len, 0]], dtype=torch.int32, device=pages.codes.device
    )
    gather_rows(pages, page_table[None], span, context_len, out.transpose(0, 1))
    return out
