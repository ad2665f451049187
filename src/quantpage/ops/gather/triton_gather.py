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

from quantpage.cache.views import QuantizedPages
from quantpage.ops.attend.triton_codes import to_float16

KEYS_A_TILE = 32


@triton.jit(do_not_specialize=["table_row", "first_head"])
def _gather_kernel(
    codes,
    scale,
    zero,
    page_table,
    spans,
    out,
    code_page,
    code_head,
    scale_page,
    scale_head,
    table_row,
    out_head,
    out_row,
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
):
    span = spans + tl.program_id(0) * 5
    request = tl.load(span)
    first_key = tl.load(span + 1)
    count = tl.load(span + 2)
    visible_end = tl.load(span + 3)
    to_row = tl.load(span + 4)
    head = tl.program_id(2)
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
        # A key that a mask hides may be a freed page's NaN, which a weight of 0 would spread.
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
    Numbers saturate at the finite range of ``out``.
    """
    if spans.shape[0] == 0 or max_span_keys <= 0:
        return
    spec, width = pages.spec, pages.head_dim
    scale, zero = pages.scale, pages.zero
    dynamic = spec.quantized and spec.dynamic
    groups = 1 if scale is None else scale.shape[-1]
    if scale is None:
        strides = (0, 0)
    elif dynamic:
        strides = (scale.stride(0), scale.stride(1))
    else:
        strides = (0, 0 if scale.shape[0] == 1 else scale.stride(0))
    limit = torch.finfo(out.dtype).max
    grid = (spans.shape[0], triton.cdiv(max_span_keys, KEYS_A_TILE), out.shape[0])
    codes = pages.codes
    _gather_kernel[grid](
        codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes,
        scale,
        zero,
        page_table,
        spans,
        out,
        pages.codes.stride(0),
        pages.codes.stride(1),
        *strides,
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        first_head,
        CODE=CODE_KINDS[spec.code.name],
        HEAD_DIM=width,
        WIDTH=triton.next_power_of_2(width),
        PAGE=pages.page_size,
        GROUPS=groups,
        DYNAMIC=dynamic,
        ZERO=zero is not None,
        LIMIT=limit,
        TILE=KEYS_A_TILE,
        OLD=out.is_cuda and torch.cuda.get_device_capability(out.device) < (8, 9),
        num_warps=4,
    )


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
