"""Keys that are rounded in turn on a GPU, where products turn them: one kernel, all in registers.

A program takes eight tokens of a kv_head a warp. Their rows are turned into the basis of the cache
as the write's kernel does it and are rounded where they lie (triton_in_turn_lanes).
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from quantpage.ops.rope_write.triton_in_turn_lanes import round_in_lanes
from quantpage.ops.rope_write.triton_in_turn_rows import kept_of, steps_of, turned_keys
from quantpage.ops.rope_write.triton_in_turn_said import ask_for_said, wait_for_said
from quantpage.ops.rope_write.triton_kernel import slots_of
from quantpage.ops.rope_write.triton_rows import store_codes, store_parts, write_rows
from quantpage.ops.triton.codes import lift, row_of
from quantpage.ops.triton.common import A_TOKEN, FP8


@triton.jit
def in_lanes_kernel(
    k, k_seen, pages, near_pages, slots, exact_slots, positions, cos, sin, weight, bias,
    map_scale, map_mean, lanes, near_lanes, eps, tokens, kv_heads, k_token, k_head, angle_row,
    CODE: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr, LIMIT: tl.constexpr,
    FACTORS: tl.constexpr, HADAMARD: tl.constexpr,
    NEAR_CODE: tl.constexpr, NEAR_ZERO: tl.constexpr, NEAR_SHARED: tl.constexpr,
    NEAR_LIMIT: tl.constexpr, NEAR_FACTORS: tl.constexpr, TRIED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, PAGE: tl.constexpr,
    EXACT: tl.constexpr, RETURN: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr,
    MADE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program has ROWS / TRIED tokens of a kv_head.

    lanes, near_lanes: of the codes of body and near pages. FACTORS: of a row's ranges; TRIED: rows
    a token, each with one of them, as many or more. near_pages: exact pages that are codes, or
    None. Others as ``write_kernel``.
    """
    if OVERLAP:
        # The launch before, of queries and values, waited for what is read here before it let this
        # one start; nothing that it writes is read.
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    EACH: tl.constexpr = ROWS // TRIED
    number = tl.arange(0, ROWS) // EACH
    token = tl.program_id(0) // kv_heads * EACH + tl.arange(0, ROWS) % EACH
    real = token < tokens
    slot, near = slots_of(slots, exact_slots, token, real, EXACT)
    own_near = near
    if TRIED > 1:
        own_near = tl.where(number == 0, near, -1)
    ask_for_said(lanes, near_lanes, kv_head, HEAD_DIM // PIECE, ROWS // 8)
    if OVERLAP and MADE:
        # Or waits at its end for the one that makes keys.
        tl.extra.cuda.gdc_wait()
    parts, high, low = turned_keys(
        k, token, real, own_near, pages, near_pages, positions, cos, sin, weight, bias, map_scale,
        map_mean, eps, kv_head, k_token, k_head, angle_row, HADAMARD, NEAR_CODE, NEAR_ZERO,
        NEAR_SHARED, NEAR_LIMIT, HEAD_DIM, PIECE, ROTARY, INTERLEAVED, NORM, BIAS, MAPPED, PAGE,
        EXACT, HARDWARE, ROWS, True, ZERO or NEAR_ZERO is True,
    )  # fmt: skip
    wait_for_said(HEAD_DIM // PIECE, ROWS // 8)
    if near_pages is not None and NEAR_CODE != FP8:  # noqa: SIM102
        # Nested: `and` would ask without near pages.
        if tl.max(near, 0) >= 0:
            _round_rows(
                parts, high, low, near_pages, near_lanes, near, kv_head, token, real, kv_heads,
                number, k_seen, NEAR_CODE, NEAR_ZERO, NEAR_SHARED, NEAR_LIMIT, NEAR_FACTORS, True,
                TRIED, HEAD_DIM, PIECE, PAGE, False, ROWS,
            )  # fmt: skip
    _round_rows(
        parts, high, low, pages, lanes, slot, kv_head, token, real, kv_heads, number, k_seen,
        CODE, ZERO, SHARED, LIMIT, FACTORS, False, TRIED, HEAD_DIM, PIECE, PAGE, RETURN, ROWS,
    )  # fmt: skip
    if OVERLAP and not MADE:
        # Who waits for this launch has to find the one before done as well.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _round_rows(
    parts, top, bottom, pages, lanes, slot, kv_head, token, real, kv_heads, number, seen,
    CODE: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr, LIMIT: tl.constexpr,
    FACTORS: tl.constexpr, NEAR: tl.constexpr, TRIED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr, RETURN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows, with the range of the least loss, into their pages; tokens that have no range with a
    finite loss each channel by itself. number: of a row's range.
    """
    LIFT: tl.constexpr = int(lift(CODE))
    # Bytes of codes are signed where nothing was added to them.
    HALF: tl.constexpr = 0 if LIFT > 0 else 0x80
    if not ZERO:
        top = tl.maximum(top, -bottom)
    step, base = steps_of(top, bottom, number, pages.scale, pages.zero, ZERO, CODE, LIMIT, FACTORS)
    inverse = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), step)
    shift = -base * inverse
    words, loss = round_in_lanes(
        parts, lanes, kv_head, inverse, shift, CODE, ZERO, NEAR, len(FACTORS) > 1, ROWS
    )
    if len(FACTORS) > 1:
        loss = loss * step * step
    else:
        # What one range loses decides nothing. No error is much larger than the largest number of a
        # row; halves of 16 bits have none for those of more than 65,504 steps.
        most = tl.maximum(top, -bottom) * inverse + tl.abs(shift)
        loss = tl.where(most < 60000.0, 0.0, float("inf"))
    keep, least = kept_of(loss, number, len(FACTORS), TRIED, ROWS)
    bits = ()
    for i in tl.static_range(len(parts)):
        bits = bits + (((words >> (8 * i)) & 0xFF).to(tl.int32),)
    page = tl.maximum(slot, 0) // PAGE
    place = tl.maximum(slot, 0) % PAGE
    stored = keep & (slot >= 0)
    plane = page * pages.scale_page + kv_head * pages.scale_head + place
    tl.store(pages.scale + plane, step.to(pages.scale.dtype.element_ty), stored)
    if ZERO:
        tl.store(pages.zero + plane, base.to(pages.zero.dtype.element_ty), stored)
    to = pages.codes + page * pages.page + kv_head * pages.head
    to += place * row_of(HEAD_DIM, CODE, 1)
    store_codes(to[:, None], bits, stored, HEAD_DIM, PIECE, ROWS, CODE)
    to_seen = seen + (token.to(tl.int64) * kv_heads + kv_head) * HEAD_DIM
    if RETURN:
        numbers = ()
        for i in tl.static_range(len(bits)):
            code = ((bits[i] ^ HALF) - (HALF + LIFT)).to(tl.float32)
            numbers = numbers + (code * step[:, None] + base[:, None],)
        store_parts(to_seen, numbers, keep & real, HEAD_DIM, PIECE)
    plain = (least == float("inf")) & real & (number == 0)
    if tl.max(tl.where(plain, 1, 0), 0) != 0:
        write_rows(
            parts, plain, tl.where(plain, slot, -1), kv_head, pages.codes, pages.scale, pages.zero,
            pages.page, pages.head, pages.scale_page, pages.scale_head, to_seen, CODE, A_TOKEN,
            ZERO, SHARED, HEAD_DIM, PIECE, PAGE, ROWS, LIMIT, False, RETURN, False, 1.0,
        )  # fmt: skip
