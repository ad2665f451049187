"""Spans of pages to dense 16-bit rows: the kernel."""

import triton
import triton.language as tl

from quantpage.ops.triton.codes import row_of, to_float16
from quantpage.ops.triton.common import A_TOKEN, INT4, NO_SCALES, NONE
from quantpage.ops.triton.planes import in_planes, plane_numbers


@triton.jit(do_not_specialize=["table_row", "first_head", "mark_head", "mark_row"])
def gather_kernel(
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
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
    OLD: tl.constexpr,
    HALVES: tl.constexpr,
    MARKS: tl.constexpr,
):
    """A program a span, TILE of its keys, and a head of one half or of both (HALVES)."""
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
        ROW: tl.constexpr = row_of(HEAD_DIM, CODE, codes.dtype.element_ty.primitive_bitwidth // 8)
        rows = codes + page * code_page + from_head * code_head + slot * ROW
        if in_planes(CODE):
            number = plane_numbers(rows[:, None], seen[:, None], HEAD_DIM, WIDTH, CODE, True)
        elif CODE == INT4:
            pair = tl.arange(0, WIDTH // 2)
            mask = seen[:, None] & (pair < HEAD_DIM // 2)[None, :]
            number = to_float16(tl.load(rows[:, None] + pair[None, :], mask, 0), CODE, OLD)
        else:
            mask = seen[:, None] & inside[None, :]
            number = tl.load(rows[:, None] + channel[None, :], mask, 0)
            if CODE != NONE:
                number = to_float16(number, CODE, OLD)
        number = number.to(tl.float32)
        if SCALES != NO_SCALES:
            group = channel // (HEAD_DIM // GROUPS)
            if SCALES == A_TOKEN:
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
        if CODE == NONE:
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
            if SCALES != A_TOKEN:
                # Dynamic scales and zeros of keys that are not seen were loaded as 0.
                number = tl.where(seen[:, None], number, 0.0)
            number = tl.minimum(tl.maximum(number, -LIMIT), LIMIT)
        row = (to_row + offset).to(tl.int64) * out_row + head.to(tl.int64) * out_head
        written = (offset < count)[:, None] & inside[None, :]
        tl.store(out + row[:, None] + channel[None, :], number.to(out.dtype.element_ty), written)
