"""Many query rows: heads of a token by keys, as warpgroups multiply 64 rows at a time.

A tile of codes becomes float16 in shared memory once, where both products read it.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.latent.triton_parts import (
    bent,
    find_keys,
    find_spans,
    load_scales,
    power_of_two,
    seen_by,
)
from quantpage.ops.triton.codes import to_float16
from quantpage.ops.triton.common import LOG2E, NONE
from quantpage.ops.triton.words import log2_fast


@triton.jit
def _asked(at, real, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """WIDTH channels of queries, float32, those from D on 0; the largest finite size of rows."""
    channel = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None] & (channel < D)[None, :]
    x = tl.load(at[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    size = tl.abs(x)
    finite = size < float("inf")
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
    return tl.where(finite, x, float("nan")), tl.max(tl.where(finite, size, 0.0), 1)


@triton.jit
def load_queries(
    q, q_start, q_len, first_row, any_row, q_token, q_head, ROW_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, ROW_WIDTH: tl.constexpr, ROTARY_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, ROW_NUMBER: tl.constexpr,
    ROTARY_NUMBER: tl.constexpr,
):  # fmt: skip
    """Queries as operands, [ROWS, ROW_WIDTH / 2] twice and [ROWS, ROTARY_WIDTH], and what scores of
    a row are to be multiplied by. any_row: False loads none.
    """
    row = first_row + tl.arange(0, ROWS)
    real = (row // HEADS < q_len) & any_row
    at = q + (q_start + row // HEADS).to(tl.int64) * q_token + (row % HEADS).to(tl.int64) * q_head
    HALF: tl.constexpr = ROW_WIDTH // 2
    q0, high = _asked(at, real, 0, HALF, ROW_DIM)
    q1, also = _asked(at, real, HALF, HALF, ROW_DIM)
    turned, too = _asked(at + ROW_DIM, real, 0, ROTARY_WIDTH, ROTARY_DIM)
    high = tl.maximum(high, tl.maximum(also, too))
    unit = power_of_two(high, ROW_NUMBER, ROTARY_NUMBER)
    return (
        (q0 * unit[:, None]).to(ROW_NUMBER),
        (q1 * unit[:, None]).to(ROW_NUMBER),
        (turned * unit[:, None]).to(ROTARY_NUMBER),
        1.0 / unit,
    )


@triton.jit
def _numbers(plane, keys, OLD: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [keys, WIDTH] of codes as float16, or of numbers in the pages' own dtype.

    Keys that nobody sees are 0: a slot may hold anything.
    """
    channel = FIRST + tl.arange(0, WIDTH)
    at = plane.codes + (keys.page * plane.page + keys.slot * plane.D)[:, None] + channel[None, :]
    if plane.D < FIRST + WIDTH:
        number = tl.load(at, keys.shown[:, None] & (channel < plane.D)[None, :], 0)
    else:
        number = tl.load(at, keys.shown[:, None], 0)
    if plane.CODE != NONE:
        number = to_float16(number, plane.CODE, OLD)
    return number


@triton.jit
def walk(
    q0, q1, q_turned, left, seat, row, rotary, table, context, new, begin, end, scoring,
    ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Key tiles ``begin`` to ``end`` of what the ``new`` last tokens of ``context`` see.

    q0, q1, q_turned, left: of ``load_queries``. seat: the position of each row's token. The output
    so far in two halves [ROWS, row.DP / 2], the peak of score and scale, and the sum of
    probabilities of each row.
    """
    spans = find_spans(context, new, scoring, PAGE, TILE)
    natural: tl.constexpr = 1.0 if scoring.SOFTCAP else LOG2E
    factor = left * (scoring.softmax_scale * natural)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over columns once, at the end: a sum across warps in every tile costs two barriers.
    weights = tl.zeros([ROWS, TILE], tl.float32)
    # In two halves, as a whole tile of codes on its way to float16 would take all registers.
    HALF: tl.constexpr = row.DP // 2
    acc0 = tl.zeros([ROWS, HALF], tl.float32)
    acc1 = tl.zeros([ROWS, HALF], tl.float32)
    for t in tl.range(begin, end, num_stages=STAGES):
        keys = find_keys(table, t, spans, scoring, PAGE, TILE)
        row0 = _numbers(row, keys, scoring.OLD, 0, HALF)
        # A product by itself, multiplied before it is added: as one that begins with another's
        # result, Triton gives all of it to both warpgroups.
        score = tl.dot(q0, row0.T) * factor[:, None]
        row1 = _numbers(row, keys, scoring.OLD, HALF, HALF)
        score += tl.dot(q1, row1.T) * factor[:, None]
        turned = _numbers(rotary, keys, scoring.OLD, 0, rotary.DP)
        other = tl.dot(q_turned, turned.T) * factor[:, None]
        if row.CODE != NONE:
            scale = load_scales(row, keys, scoring.PAIRS)
            score *= scale[None, :]
        if rotary.CODE != NONE:
            own = load_scales(rotary, keys, scoring.PAIRS)
            other *= own[None, :]
        score += other
        score = bent(score, scoring)
        if scoring.HIDES:
            # A row that is not finite reaches the queries that see it, through their own scores:
            # the second product would take it to all of them, as 0 times NaN is NaN.
            bad = tl.maximum(_bad(row0), _bad(row1)) > 0
            row0 = tl.where(bad[:, None], 0.0, row0)
            row1 = tl.where(bad[:, None], 0.0, row1)
            score = tl.where(bad[None, :], float("nan"), score)
        if keys.masked:
            seen = seen_by(keys.key[None, :], seat[:, None], keys.shown[None, :], scoring)
            score = tl.where(seen, score, float("-inf"))
            if row.CODE != NONE:
                # Where a key is hidden p is 0: what it is multiplied by has to be finite.
                scale = tl.where(keys.shown & (scale < float("inf")), scale, 0.0)
        heavy = score
        if row.CODE != NONE:
            # The row's peak is that of p * scale: the product is at most 2^SHIFT.
            heavy = score + log2_fast(tl.maximum(scale, 1e-30))[None, :]
        new_top = tl.maximum(top, tl.max(heavy, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top - scoring.SHIFT)
        shrink = tl.exp2(top - scoring.SHIFT - anchor)
        p = tl.exp2(score - anchor[:, None])
        weights = weights * shrink[:, None] + p
        if row.CODE != NONE:
            p *= scale[None, :]
        top = new_top
        p = p.to(row0.dtype)
        acc0 = tl.dot(p, row0, acc0 * shrink[:, None])
        acc1 = tl.dot(p, row1, acc1 * shrink[:, None])
    return acc0, acc1, top, tl.sum(weights, 1)


@triton.jit
def _bad(numbers):
    """1 for keys with a number that is not finite."""
    fine = tl.abs(numbers.to(tl.float32)) < float("inf")
    return tl.max(fine.to(tl.int32) ^ 1, 1)


@triton.jit
def store(to, acc0, acc1, ratio, real, D: tl.constexpr):
    """Rows of output at ``to``."""
    _store_half(to, acc0, ratio, real, 0, D)
    _store_half(to, acc1, ratio, real, acc0.shape[1], D)


@triton.jit
def _store_half(to, acc, ratio, real, FIRST: tl.constexpr, D: tl.constexpr):
    channel = FIRST + tl.arange(0, acc.shape[1])
    mask = real[:, None] & (channel < D)[None, :]
    made = acc * ratio[:, None]
    tl.store(to[:, None] + channel[None, :], made.to(to.dtype.element_ty), mask)
