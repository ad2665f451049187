"""Few query rows: both products turned over, keys by queries, as decode/triton_kernel does it.

The tensor cores' tiles have sixteen rows and eight columns: sixteen heads are two columns' worth,
and codes, read as words of four (ops/triton/words), go from shared memory to registers alone.
Part r of a word is channel 4 w + r: queries and outputs come in four parts that are strided the
same way.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

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
from quantpage.ops.triton.common import FP8, LOG2E
from quantpage.ops.triton.words import log2_fast, unpack4


@triton.jit
def _queries(at, real, plane):
    """Of a plane: four parts [words, rows], float32; the largest size of each row."""
    WIDTH: tl.constexpr = plane.DP // 4
    asked = ()
    high = tl.zeros([at.shape[0]], tl.float32)
    for i in tl.static_range(4):
        channel = tl.arange(0, WIDTH) * 4 + i
        mask = real[None, :] & (channel < plane.D)[:, None]
        x = tl.load(at[None, :] + channel[:, None], mask, 0.0).to(tl.float32)
        # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
        x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
        asked = asked + (x,)
        high = tl.maximum(high, tl.max(tl.where(x == x, tl.abs(x), 0.0), 0))
    return asked, high


@triton.jit
def _scaled(asked, unit):
    made = ()
    for i in tl.static_range(len(asked)):
        made = made + ((asked[i] * unit[None, :]).to(tl.float16),)
    return made


@triton.jit
def _words(plane, keys, TURNED: tl.constexpr):
    """A tile of codes [keys, words]; TURNED: [words, keys]."""
    WORDS: tl.constexpr = plane.D // 4
    at = plane.codes + keys.page * plane.page + keys.slot * WORDS
    word = tl.arange(0, plane.DP // 4)
    inside = word < WORDS
    # Scores are selected and integer codes are finite: only floats need the mask.
    FLOATS: tl.constexpr = plane.CODE == FP8
    if TURNED:
        mask = inside[:, None] & keys.shown[None, :] if FLOATS else inside[:, None]
        return tl.load(at[None, :] + word[:, None], mask, 0)
    else:
        mask = inside[None, :] & keys.shown[:, None] if FLOATS else inside[None, :]
        return tl.load(at[:, None] + word[None, :], mask, 0)


@triton.jit
def _product(words, asked, CODE: tl.constexpr, OLD: tl.constexpr):
    """Codes by queries, [keys, rows]."""
    k0, k1, k2, k3 = unpack4(words, CODE, OLD)
    score = tl.dot(k0, asked[0])
    score = tl.dot(k1, asked[1], score)
    score = tl.dot(k2, asked[2], score)
    return tl.dot(k3, asked[3], score)


@triton.jit
def walk(
    q, q_start, q_len, token, head, q_token, q_head, row, rotary, table, context, begin, end,
    scoring, ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As triton_rows' ``walk``, but for the output: four parts of words, [words, ROWS]."""
    at = q + (q_start + token).to(tl.int64) * q_token + head.to(tl.int64) * q_head
    real = token < q_len
    asked, high = _queries(at, real, row)
    turned, also = _queries(at + row.D, real, rotary)
    unit = power_of_two(tl.maximum(high, also), tl.float16, tl.float16)
    asked = _scaled(asked, unit)
    turned = _scaled(turned, unit)
    seat = context - q_len + token
    spans = find_spans(context, q_len, scoring, PAGE, TILE)
    natural: tl.constexpr = 1.0 if scoring.SOFTCAP else LOG2E
    factor = scoring.softmax_scale * natural / unit
    WIDTH: tl.constexpr = row.DP // 4
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over columns once, at the end: a sum across warps in every tile costs two barriers.
    weights = tl.zeros([TILE, ROWS], tl.float32)
    acc0 = tl.zeros([WIDTH, ROWS], tl.float32)
    acc1 = tl.zeros([WIDTH, ROWS], tl.float32)
    acc2 = tl.zeros([WIDTH, ROWS], tl.float32)
    acc3 = tl.zeros([WIDTH, ROWS], tl.float32)
    for t in tl.range(begin, end, num_stages=STAGES):
        keys = find_keys(table, t, spans, scoring, PAGE, TILE)
        scale = load_scales(row, keys, scoring.PAIRS)
        score = _product(_words(row, keys, False), asked, row.CODE, scoring.OLD)
        other = _product(_words(rotary, keys, False), turned, rotary.CODE, scoring.OLD)
        score = score * scale[:, None] + other * load_scales(rotary, keys, scoring.PAIRS)[:, None]
        score = bent(score * factor[None, :], scoring)
        if keys.masked:
            seen = seen_by(keys.key[:, None], seat[None, :], keys.shown[:, None], scoring)
            score = tl.where(seen, score, float("-inf"))
            # Where a key is hidden p is 0: what it is multiplied by has to be finite.
            scale = tl.where(keys.shown & (scale < float("inf")), scale, 0.0)
        # The row's peak is that of p * scale: the product is at most 2^SHIFT.
        heavy = score + log2_fast(tl.maximum(scale, 1e-30))[:, None]
        new_top = tl.maximum(top, tl.max(heavy, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top - scoring.SHIFT)
        shrink = tl.exp2(top - scoring.SHIFT - anchor)[None, :]
        p = tl.exp2(score - anchor[None, :])
        weights = weights * shrink + p
        p = (p * scale[:, None]).to(tl.float16)
        top = new_top
        # Once more, from the second-level cache: each product takes words in an order of its own,
        # and Triton copies ahead what has one use.
        v0, v1, v2, v3 = unpack4(_words(row, keys, True), row.CODE, scoring.OLD)
        acc0 = tl.dot(v0, p, acc0 * shrink)
        acc1 = tl.dot(v1, p, acc1 * shrink)
        acc2 = tl.dot(v2, p, acc2 * shrink)
        acc3 = tl.dot(v3, p, acc3 * shrink)
    return (acc0, acc1, acc2, acc3), top, tl.sum(weights, 0)


@triton.jit
def store(to, acc, ratio, real, D: tl.constexpr):
    """Rows of output at ``to``."""
    for i in tl.static_range(len(acc)):
        channel = tl.arange(0, acc[0].shape[0]) * 4 + i
        mask = real[None, :] & (channel < D)[:, None]
        made = acc[i] * ratio[None, :]
        tl.store(to[None, :] + channel[:, None], made.to(to.dtype.element_ty), mask)
