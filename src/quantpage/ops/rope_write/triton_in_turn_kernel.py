"""Keys that are rounded in turn (formats/feedback) on a GPU: the kernel.

A row's channels are rounded from the last to the first, each where the errors already made would
have it. In steps of the scale, with y the row, z its zero, U unit lower triangular and h = y U,

    u_i = (h_i - z sum_j U_ji) / s - sum_{j > i} c_j U_ji       c_i = clip(rint(u_i))

so that of what was rounded only the codes enter, which are small whole numbers: a block of sixteen
channels is rounded by threads that have a row each, and what it says to the channels before it is
a product with the tensor cores, codes in float16, U in two halves of it. h is made once a row, and
serves every range that is tried.

Rows, h and codes lie in the program's own memory between the three layouts that they are used in:
as they come, a thread a row, and operands of products. It is small enough for the caches, and the
number of programs does not depend on the number of tokens.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from quantpage.formats.feedback import RANGE_FACTORS
from quantpage.ops.rope_write.triton_kernel import (
    angles_of,
    load_parts,
    positions_of,
    slots_of,
    turned_parts,
)
from quantpage.ops.rope_write.triton_rows import (
    finite,
    larger,
    rounded_scales,
    smaller,
    store_codes,
    store_parts,
    write_exact,
    write_near,
)
from quantpage.ops.triton.codes import largest, lift, row_of, smallest
from quantpage.ops.triton.common import A_TOKEN, FP8, STATIC, Constant

BLOCK = Constant(16)
"""Channels that are rounded between two products; divides every head_dim that is served."""
_ROUND = Constant(12582912.0)


@triton.constexpr_function
def _factor(number):
    return RANGE_FACTORS[number]


@triton.constexpr_function
def _rest(number):
    return 1.0 - RANGE_FACTORS[number]


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
    CHUNK: tl.constexpr, OWN: tl.constexpr, OWN_CODES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs take tiles of ROWS tokens of a kv_head, in turns.

    coupling, near_coupling: of the codes of body and near pages. own, own_codes: OWN float32 and
    OWN_CODES float16 a program. FACTORS: ranges of a row that are tried, TRIED of them at once.
    near_pages: exact pages that are codes, or None. Others as ``write_kernel``.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    rows = own + tl.program_id(0).to(tl.int64) * OWN
    codes = own_codes + tl.program_id(0).to(tl.int64) * OWN_CODES
    PAIRED: tl.constexpr = ROTARY == HEAD_DIM and HEAD_DIM % (2 * PIECE) == 0 and not INTERLEAVED
    items = tl.cdiv(tokens, ROWS) * kv_heads
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        kv_head = (item % kv_heads).to(tl.int64)
        first_token = item // kv_heads * ROWS
        token = first_token + row
        real = token < tokens
        at = token.to(tl.int64) * k_token + kv_head * k_head
        parts = load_parts(k, at, real, HEAD_DIM, PIECE)
        where = positions_of(positions, token, real, angle_row, ROTARY)
        cosine, sine = angles_of(
            cos, sin, where, real, 1.0, ROTARY, INTERLEAVED, HEAD_DIM, PIECE, PAIRED, False
        )
        of_head = kv_head * HEAD_DIM + row * 0
        parts = turned_parts(
            parts, k, at, cosine, sine, real, bias + of_head, weight, map_scale + of_head,
            map_mean + of_head, eps, real, HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED,
            PAIRED, HADAMARD, False, False, False, MAPPED,
        )  # fmt: skip
        _, near = slots_of(slots, exact_slots, token, real, EXACT)
        if EXACT and near_pages is None:
            write_exact(
                parts, near, kv_head, pages.exact, pages.exact_page, pages.exact_head, HEAD_DIM,
                PIECE, PAGE,
            )  # fmt: skip
        elif NEAR_CODE == FP8:
            # A code of fp8 has no next one at an equal distance.
            write_near(
                parts, near, kv_head, near_pages, NEAR_CODE, NEAR_ZERO, NEAR_SHARED, HEAD_DIM,
                PIECE, PAGE, ROWS, NEAR_LIMIT, HARDWARE, HADAMARD > 1, 1.0,
            )  # fmt: skip
        tl.debug_barrier()
        for i in tl.static_range(len(parts)):
            channel = i * PIECE + tl.arange(0, PIECE)
            to = rows + channel[None, :] * ROWS + row[:, None]
            tl.store(to, finite(parts[i]), tl.broadcast_to((channel < HEAD_DIM)[None, :], to.shape))
        tl.debug_barrier()
        if near_pages is not None and NEAR_CODE != FP8:  # noqa: SIM102
            # Nested: `and` would ask without near pages.
            if tl.max(near, 0) >= 0:
                _round_rows(
                    rows, codes, near_pages, near_coupling, exact_slots, kv_head, first_token,
                    tokens, kv_heads, k_seen, NEAR_CODE, A_TOKEN, NEAR_ZERO, NEAR_SHARED,
                    NEAR_LIMIT, NEAR_FACTORS, NEAR_TRIED, HEAD_DIM, PIECE, PAGE, False, ROWS, CHUNK,
                )  # fmt: skip
        _round_rows(
            rows, codes, pages, coupling, slots, kv_head, first_token, tokens, kv_heads, k_seen,
            CODE, SCALES, ZERO, SHARED, LIMIT, FACTORS, TRIED, HEAD_DIM, PIECE, PAGE, RETURN, ROWS,
            CHUNK,
        )  # fmt: skip


@triton.jit
def _round_rows(
    rows, codes, pages, coupling, slots, kv_head, first_token, tokens, kv_heads, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    LIMIT: tl.constexpr, FACTORS: tl.constexpr, TRIED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr, RETURN: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The rows of one tile, with the range of the least loss, into their pages.

    A thread's row is a token with one of TRIED ranges; number FACTORS is the row rounded plainly,
    for tokens of which no range has a finite loss. It is tried with the others where there is room,
    else only if a token of the tile needs it.
    """
    ALL: tl.constexpr = ROWS * TRIED
    DYNAMIC: tl.constexpr = SCALES == A_TOKEN
    QMAX: tl.constexpr = largest(CODE)
    QMIN: tl.constexpr = smallest(CODE)
    LOW: tl.constexpr = QMIN if ZERO else -QMAX
    LIFTED: tl.constexpr = _ROUND + lift(CODE)
    mine = tl.arange(0, ALL)
    turn = mine % ROWS
    number = mine // ROWS
    token = first_token + turn
    real = token < tokens
    slot = tl.load(slots + token, real, -1)
    lower = coupling.lower + kv_head * (HEAD_DIM * HEAD_DIM)
    high = coupling.high + kv_head * (HEAD_DIM * HEAD_DIM)
    low = coupling.low + kv_head * (HEAD_DIM * HEAD_DIM)
    scale = pages.scale
    zero = pages.zero
    if SCALES == STATIC:
        scale += kv_head * pages.scale_head
        zero += kv_head * pages.scale_head
    # Rows, h, their extremes, sums of U's columns: a channel of all rows after the other.
    extremes = rows + 2 * HEAD_DIM * ROWS
    sums = extremes + 2 * ROWS
    _lift_rows(
        rows, extremes, sums, lower, scale, zero, SCALES, ZERO, SHARED, HEAD_DIM, ROWS, CHUNK
    )
    tl.debug_barrier()
    top = tl.load(extremes + turn)
    bottom = tl.load(extremes + ROWS + turn)
    within = tl.arange(0, BLOCK)
    code_rows = codes + mine * HEAD_DIM
    least = tl.full([ALL], float("inf"), tl.float32)
    first = 0
    last = FACTORS if TRIED == 1 else 1
    while first < last:
        candidate = first + number
        plain = candidate == FACTORS
        live = tl.where(plain, 0.0, 1.0)
        step = live * 0.0 + 1.0
        base = live * 0.0
        if DYNAMIC:
            factor = live * 0.0 + 1.0
            rest = live * 0.0
            if FACTORS > 1:
                for i in tl.static_range(FACTORS):
                    factor = tl.where(candidate == i, _factor(i), factor)
                    rest = tl.where(candidate == i, _rest(i), rest)
            step, base = rounded_scales(
                top, bottom, factor, rest, scale, zero, ZERO, QMAX, QMIN, LIMIT
            )
        inverse = tl.math.div_rn(live * 0.0 + 1.0, step)
        shift = -base * inverse
        source = rows + tl.where(plain, 0, HEAD_DIM * ROWS) + turn
        loss = live * 0.0
        for back in range(HEAD_DIM // BLOCK):
            begin = HEAD_DIM - BLOCK - back * BLOCK
            said = tl.zeros([ALL, BLOCK], tl.float32)
            for chunk in range((begin + BLOCK) // CHUNK * CHUNK, HEAD_DIM, CHUNK):
                behind = chunk + tl.arange(0, CHUNK)
                there = (behind >= begin + BLOCK) & (behind < HEAD_DIM)
                c = tl.load(code_rows[:, None] + behind[None, :], there[None, :], 0.0)
                at = behind[:, None] * HEAD_DIM + begin + within[None, :]
                said = tl.dot(c, tl.load(high + at, there[:, None], 0.0), said)
                said = tl.dot(c, tl.load(low + at, there[:, None], 0.0), said)
            said = _columns(said, ALL)
            wanted = ()
            for i in tl.static_range(BLOCK):
                u = tl.load(source + (begin + i) * ROWS)
                if SCALES == STATIC:
                    owner = (begin + i) // SHARED
                    own = tl.load(scale + owner).to(tl.float32)
                    other = u
                    if ZERO:
                        other -= tl.load(zero + owner).to(tl.float32)
                    u = tl.where(plain, tl.math.div_rn(other, other * 0.0 + own), u)
                elif ZERO:
                    u = u * inverse + shift * tl.where(plain, 1.0, tl.load(sums + begin + i))
                else:
                    u = u * inverse
                wanted = wanted + (u - said[i] * live,)
            made = ()
            block = lower + begin * HEAD_DIM + begin
            for i in tl.static_range(BLOCK - 1, -1, -1):
                held = tl.minimum(tl.maximum(wanted[i] + LIFTED, LOW + LIFTED), QMAX + LIFTED)
                code = held - LIFTED
                off = code - wanted[i]
                loss += tl.load(block + i * HEAD_DIM + i) * off * off
                made = (code,) + made
                fed = code * live
                left = ()
                for j in tl.static_range(i):
                    left = left + (wanted[j] - fed * tl.load(block + i * HEAD_DIM + j),)
                wanted = left
            tl.store(code_rows[:, None] + begin + within[None, :], _rows(made, ALL).to(tl.float16))
            tl.debug_barrier()
        loss = loss * step * step
        if TRIED == 1:
            # A loss that is no number is never less.
            less = (loss < least) & (first < FACTORS)
            keep = less | (plain & (least == float("inf")))
            least = tl.where(less, loss, least)
            first += 1
            unfit = tl.max(tl.where(least < float("inf"), 0, 1), 0)
            last = tl.where(first == FACTORS, FACTORS + unfit, last)
        else:
            known = (candidate < FACTORS) & (loss == loss)
            tried = tl.reshape(tl.where(known, loss, float("inf")), [TRIED, ROWS])
            best = tl.min(tried, 0)
            order = tl.arange(0, TRIED)[:, None]
            chosen = tl.min(tl.where(tried == best[None, :], order, TRIED), 0)
            chosen = tl.where(best < float("inf"), chosen, FACTORS)
            chosen = tl.reshape(tl.broadcast_to(chosen[None, :], [TRIED, ROWS]), [ALL])
            keep = number == chosen
            first += 1
        _keep_rows(
            code_rows, keep, slot, token, real, step, base, pages, scale, zero, kv_head, kv_heads,
            seen, CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, RETURN, ALL,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _lift_rows(
    rows, extremes, sums, lower, scale, zero, SCALES: tl.constexpr, ZERO: tl.constexpr,
    SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """h of the rows, in steps where scales are given; else their extremes and sums of columns."""
    row = tl.arange(0, ROWS)
    within = tl.arange(0, BLOCK)
    top = tl.full([ROWS], 0.0, tl.float32)
    bottom = top
    if ZERO:
        top = top - float("inf")
        bottom = bottom + float("inf")
    for chunk in range(0, HEAD_DIM, CHUNK):
        channel = chunk + tl.arange(0, CHUNK)
        inside = (channel < HEAD_DIM)[None, :]
        y = tl.load(rows + channel[None, :] * ROWS + row[:, None], inside, 0.0)
        if ZERO:
            top = larger(top, tl.max(tl.where(inside, y, float("-inf")), 1))
            bottom = smaller(bottom, tl.min(tl.where(inside, y, float("inf")), 1))
        else:
            top = larger(top, tl.max(tl.abs(y), 1))
    tl.store(extremes + row, top)
    tl.store(extremes + ROWS + row, bottom)
    for begin in range(0, HEAD_DIM, BLOCK):
        channel = begin + within
        at = rows + channel[None, :] * ROWS + row[:, None]
        h = _in_steps(tl.load(at), scale, zero, channel, True, SCALES, ZERO, SHARED)
        total = within * 0.0 + 1.0
        for chunk in range(begin // CHUNK * CHUNK, HEAD_DIM, CHUNK):
            behind = chunk + tl.arange(0, CHUNK)
            inside = behind < HEAD_DIM
            y = tl.load(rows + behind[None, :] * ROWS + row[:, None], inside[None, :], 0.0)
            y = _in_steps(y, scale, zero, behind, inside, SCALES, ZERO, SHARED)
            below = inside[:, None] & (behind[:, None] > channel[None, :])
            u = tl.load(lower + behind[:, None] * HEAD_DIM + channel[None, :], below, 0.0)
            h = tl.dot(y, u, h, input_precision="tf32x3")
            total += tl.sum(u, 0)
        tl.store(at + HEAD_DIM * ROWS, h)
        tl.store(sums + channel, total)


@triton.jit
def _in_steps(
    y, scale, zero, channel, inside, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr
):
    if SCALES == STATIC:
        if ZERO:
            y -= tl.load(zero + channel // SHARED, inside, 0.0).to(tl.float32)[None, :]
        own = tl.load(scale + channel // SHARED, inside, 1.0).to(tl.float32)[None, :]
        return tl.math.div_rn(y, tl.broadcast_to(own, y.shape))
    else:
        return y


@triton.jit
def _keep_rows(
    code_rows, keep, slot, token, real, step, base, pages, scale, zero, kv_head, kv_heads, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, RETURN: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Codes, scales and round-tripped rows of those threads that ``keep`` theirs."""
    stored = keep & (slot >= 0)
    page = tl.maximum(slot, 0) // PAGE
    place = tl.maximum(slot, 0) % PAGE
    if SCALES == A_TOKEN:
        plane = page * pages.scale_page + kv_head * pages.scale_head + place
        tl.store(scale + plane, step.to(scale.dtype.element_ty), stored)
        if ZERO:
            tl.store(zero + plane, base.to(zero.dtype.element_ty), stored)
    bits = ()
    numbers = ()
    for i in tl.static_range((HEAD_DIM + PIECE - 1) // PIECE):
        channel = i * PIECE + tl.arange(0, PIECE)
        inside = channel < HEAD_DIM
        code = tl.load(code_rows[:, None] + channel[None, :], keep[:, None] & inside[None, :], 0.0)
        code = code.to(tl.float32)
        bits = bits + ((code + lift(CODE)).to(tl.int32),)
        if RETURN:
            if SCALES == STATIC:
                number = code * tl.load(scale + channel // SHARED, inside, 1.0).to(tl.float32)
                if ZERO:
                    number += tl.load(zero + channel // SHARED, inside, 0.0).to(tl.float32)
            else:
                number = code * step[:, None] + base[:, None]
            numbers = numbers + (number,)
    to = pages.codes + page * pages.page + kv_head * pages.head
    to += place * row_of(HEAD_DIM, CODE, 1)
    store_codes(to[:, None], bits, stored, HEAD_DIM, PIECE, ALL, CODE)
    if RETURN:
        to_seen = seen + (token.to(tl.int64) * kv_heads + kv_head) * HEAD_DIM
        store_parts(to_seen, numbers, keep & real, HEAD_DIM, PIECE)


@triton.jit
def _columns(x, ROWS: tl.constexpr):
    """[ROWS, 16] as sixteen columns, each a thread's own."""
    columns = (x,)
    for level in tl.static_range(4):
        even = ()
        odd = ()
        for i in tl.static_range(len(columns)):
            if level < 3:
                one, two = tl.split(tl.reshape(columns[i], [ROWS, 8 >> level, 2]))
            else:
                one, two = tl.split(columns[i])
            even = even + (one,)
            odd = odd + (two,)
        columns = even + odd
    return columns


@triton.jit
def _rows(columns, ROWS: tl.constexpr):
    """Sixteen columns as [ROWS, 16]: ``_columns`` undone."""
    for _ in tl.static_range(4):
        pairs = ()
        for i in tl.static_range(len(columns) // 2):
            pairs = pairs + (tl.join(columns[i], columns[i + len(columns) // 2]),)
        columns = pairs
    return tl.reshape(columns[0], [ROWS, 16])
