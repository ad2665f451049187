"""Keys that are rounded in turn (formats/feedback) on a GPU: the kernel.

A row's channels are rounded from the last to the first, each where the errors already made would
have it. Rows are turned into the basis of the cache as the write's kernel does it, lie in the
program's own memory, and are rounded in blocks of sixteen channels (triton_in_turn_block), a thread
a row. That memory is small enough for the caches; it does not grow with the number of tokens.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from quantpage.ops.rope_write.triton_in_turn_block import BLOCK, of_block, round_block
from quantpage.ops.rope_write.triton_in_turn_rows import asked_for, kept_of, steps_of, turned_keys
from quantpage.ops.rope_write.triton_kernel import slots_of
from quantpage.ops.rope_write.triton_rows import store_codes, store_parts, write_rows
from quantpage.ops.triton.codes import lift, row_of
from quantpage.ops.triton.common import A_TOKEN, FP8, INT8, INTERPRETED, STATIC


@triton.jit
def in_turn_kernel(
    k, k_seen, pages, near_pages, slots, exact_slots, positions, cos, sin, weight, bias,
    map_scale, map_mean, coupling, near_coupling, own, own_codes, eps, tokens, kv_heads,
    k_token, k_head, angle_row,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    LIMIT: tl.constexpr, FACTORS: tl.constexpr, TRIED: tl.constexpr, HADAMARD: tl.constexpr,
    NEAR_CODE: tl.constexpr, NEAR_ZERO: tl.constexpr, NEAR_SHARED: tl.constexpr,
    NEAR_LIMIT: tl.constexpr, NEAR_FACTORS: tl.constexpr, NEAR_TRIED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, PAGE: tl.constexpr,
    EXACT: tl.constexpr, RETURN: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, OWN_CODES: tl.constexpr, MADE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs take tiles of ROWS tokens of a kv_head, in turns.

    coupling, near_coupling: of the codes of body and near pages. own, own_codes: OWN float32 and
    OWN_CODES codes a program. FACTORS: of a row's ranges; TRIED: threads a row, as many or more.
    near_pages: exact pages that are codes, or None. Others as ``write_kernel``.
    """
    if OVERLAP:
        # The launch before, of queries and values, waited for what is read here before it let this
        # one start, or (MADE) waits at its end for the one that makes keys.
        tl.extra.cuda.gdc_launch_dependents()
        if MADE:
            tl.extra.cuda.gdc_wait()
    rows = own + tl.program_id(0).to(tl.int64) * OWN
    codes = own_codes + tl.program_id(0).to(tl.int64) * OWN_CODES
    items = tl.cdiv(tokens, ROWS) * kv_heads
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        kv_head = (item % kv_heads).to(tl.int64)
        token = item // kv_heads * ROWS + tl.arange(0, ROWS)
        real = token < tokens
        # Who reads the rows of a tile before has done so.
        tl.debug_barrier()
        if not INTERPRETED:
            LINES: tl.constexpr = HEAD_DIM // 2
            line = tl.arange(0, triton.next_power_of_2(LINES)) % LINES
            asked_for(coupling.within + kv_head * (HEAD_DIM * BLOCK) + line * 32)
        _, near = slots_of(slots, exact_slots, token, real, EXACT)
        parts, top, bottom = turned_keys(
            k, token, real, near, pages, near_pages, positions, cos, sin, weight, bias, map_scale,
            map_mean, eps, kv_head, k_token, k_head, angle_row, HADAMARD, NEAR_CODE, NEAR_ZERO,
            NEAR_SHARED, NEAR_LIMIT, HEAD_DIM, PIECE, ROTARY, INTERLEAVED, NORM, BIAS, MAPPED, PAGE,
            EXACT, HARDWARE, ROWS, False, ZERO or NEAR_ZERO is True,
        )  # fmt: skip
        _store(parts, top, bottom, rows, HEAD_DIM, PIECE, ROWS)
        tl.debug_barrier()
        if near_pages is not None and NEAR_CODE != FP8:  # noqa: SIM102
            # Nested: `and` would ask without near pages.
            if tl.max(near, 0) >= 0:
                _round_rows(
                    rows, codes, near_pages, near_coupling, exact_slots, kv_head,
                    item // kv_heads * ROWS, tokens, kv_heads, k_seen, NEAR_CODE, A_TOKEN,
                    NEAR_ZERO, NEAR_SHARED, NEAR_LIMIT, NEAR_FACTORS, NEAR_TRIED, HEAD_DIM, PIECE,
                    PAGE, False, ROWS,
                )  # fmt: skip
        _round_rows(
            rows, codes, pages, coupling, slots, kv_head, item // kv_heads * ROWS, tokens, kv_heads,
            k_seen, CODE, SCALES, ZERO, SHARED, LIMIT, FACTORS, TRIED, HEAD_DIM, PIECE, PAGE,
            RETURN, ROWS,
        )  # fmt: skip
    if OVERLAP and not MADE:
        # Who waits for this launch has to find the one before done as well.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _store(
    parts, top, bottom, rows, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Rows to ``rows``, a channel of all after the other; largest and smallest of each behind."""
    row = tl.arange(0, ROWS)
    for i in tl.static_range(len(parts)):
        channel = i * PIECE + tl.arange(0, PIECE)
        to = rows + channel[None, :] * ROWS + row[:, None]
        if (i + 1) * PIECE > HEAD_DIM:
            tl.store(to, parts[i], tl.broadcast_to((channel < HEAD_DIM)[None, :], to.shape))
        else:
            tl.store(to, parts[i])
    tl.store(rows + HEAD_DIM * ROWS + row, top)
    tl.store(rows + HEAD_DIM * ROWS + ROWS + row, bottom)


@triton.jit
def _round_rows(
    rows, codes, pages, coupling, slots, kv_head, first_token, tokens, kv_heads, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    LIMIT: tl.constexpr, FACTORS: tl.constexpr, TRIED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr, RETURN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of one tile, with the range of the least loss, into their pages.

    A thread's row is a token with one of TRIED ranges; rows of which no range has a finite loss are
    rounded plainly.
    """
    ALL: tl.constexpr = ROWS * TRIED
    DYNAMIC: tl.constexpr = SCALES == A_TOKEN
    BLOCKS: tl.constexpr = HEAD_DIM // BLOCK
    # What one dynamic range loses decides nothing.
    MEASURED: tl.constexpr = len(FACTORS) > 1 or not DYNAMIC
    # A row's only range is stored as it is found, where a block of it is whole words.
    DIRECT: tl.constexpr = len(FACTORS) == 1 and CODE == INT8 and not RETURN
    mine = tl.arange(0, ALL)
    turn = mine % ROWS
    number = mine // ROWS
    token = first_token + turn
    real = token < tokens
    slot = tl.load(slots + token, real, -1)
    scale = pages.scale
    zero = pages.zero
    if SCALES == STATIC:
        scale += kv_head * pages.scale_head
        zero += kv_head * pages.scale_head
    page = tl.maximum(slot, 0) // PAGE
    place = tl.maximum(slot, 0) % PAGE
    to = pages.codes + page * pages.page + kv_head * pages.head
    to += place * row_of(HEAD_DIM, CODE, 1)
    plane = page * pages.scale_page + kv_head * pages.scale_head + place
    top = tl.load(rows + HEAD_DIM * ROWS + turn)
    bottom = tl.load(rows + HEAD_DIM * ROWS + ROWS + turn)
    if not ZERO:
        top = tl.maximum(top, -bottom)
    code_rows = codes + mine * HEAD_DIM
    step = tl.full([ALL], 1.0, tl.float32)
    base = tl.full([ALL], 0.0, tl.float32)
    if DYNAMIC:
        step, base = steps_of(top, bottom, number, scale, zero, ZERO, CODE, LIMIT, FACTORS)
    inverse = tl.math.div_rn(tl.full([ALL], 1.0, tl.float32), step)
    shift = -base * inverse
    loss = tl.full([ALL], 0.0, tl.float32)
    nothing = tl.zeros([ALL, BLOCK], tl.float32)
    heard = ()
    for _ in tl.static_range(triton.next_power_of_2(HEAD_DIM) // BLOCK):
        heard = heard + (nothing,)
    ahead = of_block(rows, BLOCKS - 1, turn, ROWS)
    # All that it reads is written: the next block's factors come while this one is rounded.
    for back in tl.range(BLOCKS, num_stages=2):
        heard, ahead, loss = round_block(
            BLOCKS - 1 - back, heard, ahead, rows, code_rows, to, slot, coupling, scale, zero,
            kv_head, turn, inverse, shift, loss, CODE, SCALES, ZERO, SHARED, MEASURED, DIRECT,
            HEAD_DIM, ROWS, ALL,
        )  # fmt: skip
    if not MEASURED:
        # No error is much larger than the largest number of a row; halves of 16 bits have none
        # for those of more than 65,504 steps.
        most = tl.maximum(top, -bottom) * inverse + tl.abs(shift)
        loss = tl.where(most < 60000.0, 0.0, float("inf"))
    else:
        loss = loss * step * step
    keep, least = kept_of(loss, number, len(FACTORS), TRIED, ALL)
    stored = keep & (slot >= 0)
    if DYNAMIC:
        tl.store(scale + plane, step.to(scale.dtype.element_ty), stored)
        if ZERO:
            tl.store(zero + plane, base.to(zero.dtype.element_ty), stored)
    if not DIRECT:
        tl.debug_barrier()
        _keep_rows(
            code_rows, to, keep, slot, token, real, step, base, scale, zero, kv_head, kv_heads,
            seen, CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, RETURN, ALL,
        )  # fmt: skip
        tl.debug_barrier()
    # Nothing of a padded tile's end is anybody's.
    plain = (least == float("inf")) & real & (number == 0)
    if tl.max(tl.where(plain, 1, 0), 0) != 0:
        tl.debug_barrier()
        _round_plainly(
            rows, pages, tl.where(plain, slot, -1), plain, turn, token, kv_head, kv_heads, seen,
            CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, RETURN, ROWS, ALL, LIMIT,
        )  # fmt: skip


@triton.jit
def _round_plainly(
    rows, pages, slot, plain, turn, token, kv_head, kv_heads, seen, CODE: tl.constexpr,
    SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr, RETURN: tl.constexpr, ROWS: tl.constexpr,
    ALL: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Rows whose slots are given, each channel by itself."""
    parts = ()
    for i in tl.static_range((HEAD_DIM + PIECE - 1) // PIECE):
        channel = i * PIECE + tl.arange(0, PIECE)
        at = rows + channel[None, :] * ROWS + turn[:, None]
        parts = parts + (tl.load(at, (channel < HEAD_DIM)[None, :], 0.0),)
    write_rows(
        parts, plain, slot, kv_head, pages.codes, pages.scale, pages.zero, pages.page, pages.head,
        pages.scale_page, pages.scale_head,
        seen + (token.to(tl.int64) * kv_heads + kv_head) * HEAD_DIM,
        CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, ALL, LIMIT, False, RETURN, False, 1.0,
    )  # fmt: skip


@triton.jit
def _keep_rows(
    code_rows, to, keep, slot, token, real, step, base, scale, zero, kv_head, kv_heads, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, RETURN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Codes and round-tripped rows of those threads that ``keep`` theirs."""
    stored = keep & (slot >= 0)
    LIFT: tl.constexpr = int(lift(CODE))
    bits = ()
    numbers = ()
    for i in tl.static_range((HEAD_DIM + PIECE - 1) // PIECE):
        channel = i * PIECE + tl.arange(0, PIECE)
        inside = channel < HEAD_DIM
        code = tl.load(code_rows[:, None] + channel[None, :], keep[:, None] & inside[None, :], 0)
        bits = bits + (code.to(tl.int32) + LIFT,)
        if RETURN:
            code = code.to(tl.float32)
            if SCALES == STATIC:
                number = code * tl.load(scale + channel // SHARED, inside, 1.0).to(tl.float32)
                if ZERO:
                    number += tl.load(zero + channel // SHARED, inside, 0.0).to(tl.float32)
            else:
                number = code * step[:, None] + base[:, None]
            numbers = numbers + (number,)
    store_codes(to[:, None], bits, stored, HEAD_DIM, PIECE, ALL, CODE)
    if RETURN:
        to_seen = seen + (token.to(tl.int64) * kv_heads + kv_head) * HEAD_DIM
        store_parts(to_seen, numbers, keep & real, HEAD_DIM, PIECE)
