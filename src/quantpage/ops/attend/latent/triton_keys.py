"""Few query rows: both products turned over, keys by queries, as decode/triton_kernel does it.

The tensor cores' tiles have sixteen rows and eight columns: sixteen heads are two columns' worth,
and codes, read as words of four (ops/triton/words), go from shared memory to registers alone.
Part r of a word is channel 4 w + r: queries and outputs come in parts that are strided the same
way. Numbers of 16 bits are one part. A row is taken in CHUNKS, as a whole tile of it as float16
would take all registers.
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
from quantpage.ops.triton.common import FP8, LOG2E, NONE
from quantpage.ops.triton.words import log2_fast, unpack4


@triton.jit
def _asked(
    at, real, FIRST: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """Queries [WIDTH, rows] at every PARTS-th channel from FIRST on, float32, 0 from D on."""
    channel = tl.arange(0, WIDTH) * PARTS + FIRST
    mask = real[None, :] & (channel < D)[:, None]
    x = tl.load(at[None, :] + channel[:, None], mask, 0.0).to(tl.float32)
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _queries(at, real, plane, CHUNKS: tl.constexpr):
    """Of a plane: PARTS of each chunk, one after the other; the largest size of each row."""
    PARTS: tl.constexpr = 1 if plane.CODE == NONE else 4
    WIDTH: tl.constexpr = plane.DP // PARTS // CHUNKS
    asked = ()
    high = tl.zeros([at.shape[0]], tl.float32)
    for i in tl.static_range(CHUNKS * PARTS):
        x = _asked(at, real, i // PARTS * WIDTH * PARTS + i % PARTS, PARTS, WIDTH, plane.D)
        asked = asked + (x,)
        high = tl.maximum(high, tl.max(tl.where(x == x, tl.abs(x), 0.0), 0))
    return asked, high


@triton.jit
def _scaled(asked, unit, NUMBER: tl.constexpr):
    made = ()
    for i in tl.static_range(len(asked)):
        made = made + ((asked[i] * unit[None, :]).to(NUMBER),)
    return made


@triton.jit
def _words(plane, keys, CHUNKS: tl.constexpr, TURNED: tl.constexpr):
    """A tile of codes in chunks [keys, words], or of 16-bit numbers; TURNED: [words, keys]."""
    PARTS: tl.constexpr = 1 if plane.CODE == NONE else 4
    WORDS: tl.constexpr = plane.D // PARTS
    WIDTH: tl.constexpr = plane.DP // PARTS // CHUNKS
    at = plane.codes + keys.page * plane.page + keys.slot * WORDS
    # Scores are selected and integer codes are finite: only floats need the mask.
    FLOATS: tl.constexpr = plane.CODE == NONE or plane.CODE == FP8
    made = ()
    for i in tl.static_range(CHUNKS):
        word = i * WIDTH + tl.arange(0, WIDTH)
        inside = word < WORDS
        if TURNED:
            mask = inside[:, None] & keys.shown[None, :] if FLOATS else inside[:, None]
            made = made + (tl.load(at[None, :] + word[:, None], mask, 0),)
        else:
            mask = inside[None, :] & keys.shown[:, None] if FLOATS else inside[None, :]
            made = made + (tl.load(at[:, None] + word[None, :], mask, 0),)
    return made


@triton.jit
def _product(words, asked, plane, TILE: tl.constexpr, ROWS: tl.constexpr, OLD: tl.constexpr):
    """Codes by queries, [keys, rows]."""
    score = tl.zeros([TILE, ROWS], tl.float32)
    for i in tl.static_range(len(words)):
        if plane.CODE == NONE:
            score = tl.dot(words[i], asked[i], score)
        else:
            k0, k1, k2, k3 = unpack4(words[i], plane.CODE, OLD)
            score = tl.dot(k0, asked[4 * i], score)
            score = tl.dot(k1, asked[4 * i + 1], score)
            score = tl.dot(k2, asked[4 * i + 2], score)
            score = tl.dot(k3, asked[4 * i + 3], score)
    return score


@triton.jit
def _added(acc, words, p, shrink, bad, plane, HIDES: tl.constexpr, OLD: tl.constexpr):
    """Outputs and a tile's values; words with channels first."""
    made = ()
    for i in tl.static_range(len(words)):
        turned = words[i]
        if HIDES:
            turned = tl.where(bad[None, :], 0.0, turned)
        if plane.CODE == NONE:
            made = made + (tl.dot(turned, p, acc[i] * shrink),)
        else:
            v0, v1, v2, v3 = unpack4(turned, plane.CODE, OLD)
            made = made + (tl.dot(v0, p, acc[4 * i] * shrink),)
            made = made + (tl.dot(v1, p, acc[4 * i + 1] * shrink),)
            made = made + (tl.dot(v2, p, acc[4 * i + 2] * shrink),)
            made = made + (tl.dot(v3, p, acc[4 * i + 3] * shrink),)
    return made


@triton.jit
def _unfit(words):
    """Keys with a number that is not finite."""
    found = tl.zeros([words[0].shape[0]], tl.int32)
    for i in tl.static_range(len(words)):
        fine = tl.abs(words[i].to(tl.float32)) < float("inf")
        found = tl.maximum(found, tl.max(fine.to(tl.int32) ^ 1, 1))
    return found > 0


@triton.jit
def walk(
    q, q_start, q_len, token, head, q_token, q_head, row, rotary, table, context, begin, end,
    scoring, ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
    CHUNKS: tl.constexpr, ROW_NUMBER: tl.constexpr, ROTARY_NUMBER: tl.constexpr,
):  # fmt: skip
    """As triton_rows' ``walk``, but for the output: chunks, in each its parts, [words, ROWS]."""
    at = q + (q_start + token).to(tl.int64) * q_token + head.to(tl.int64) * q_head
    real = token < q_len
    asked, high = _queries(at, real, row, CHUNKS)
    turned, also = _queries(at + row.D, real, rotary, 1)
    unit = power_of_two(tl.maximum(high, also), ROW_NUMBER, ROTARY_NUMBER)
    asked = _scaled(asked, unit, ROW_NUMBER)
    turned = _scaled(turned, unit, ROTARY_NUMBER)
    seat = context - q_len + token
    spans = find_spans(context, q_len, scoring, PAGE, TILE)
    natural: tl.constexpr = 1.0 if scoring.SOFTCAP else LOG2E
    factor = scoring.softmax_scale * natural / unit
    WIDTH: tl.constexpr = row.DP // len(asked)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over columns once, at the end: a sum across warps in every tile costs two barriers.
    weights = tl.zeros([TILE, ROWS], tl.float32)
    acc = ()
    for _i in tl.static_range(len(asked)):
        acc = acc + (tl.zeros([WIDTH, ROWS], tl.float32),)
    for t in tl.range(begin, end, num_stages=STAGES):
        keys = find_keys(table, t, spans, scoring, PAGE, TILE)
        words = _words(row, keys, CHUNKS, False)
        score = _product(words, asked, row, TILE, ROWS, scoring.OLD)
        if row.CODE != NONE:
            scale = load_scales(row, keys, scoring.PAIRS)
            score *= scale[:, None]
        other = _product(_words(rotary, keys, 1, False), turned, rotary, TILE, ROWS, scoring.OLD)
        if rotary.CODE != NONE:
            other *= load_scales(rotary, keys, scoring.PAIRS)[:, None]
        score = bent((score + other) * factor[None, :], scoring)
        bad = keys.shown
        if scoring.HIDES:
            # A row that is not finite reaches the queries that see it, through their own scores:
            # the second product would take it to all of them, as 0 times NaN is NaN.
            bad = _unfit(words)
            score = tl.where(bad[:, None], float("nan"), score)
        if keys.masked:
            seen = seen_by(keys.key[:, None], seat[None, :], keys.shown[:, None], scoring)
            score = tl.where(seen, score, float("-inf"))
            if row.CODE != NONE:
                # Where a key is hidden p is 0: what it is multiplied by has to be finite.
                scale = tl.where(keys.shown & (scale < float("inf")), scale, 0.0)
        heavy = score
        if row.CODE != NONE:
            # The row's peak is that of p * scale: the product is at most 2^SHIFT.
            heavy = score + log2_fast(tl.maximum(scale, 1e-30))[:, None]
        new_top = tl.maximum(top, tl.max(heavy, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top - scoring.SHIFT)
        shrink = tl.exp2(top - scoring.SHIFT - anchor)[None, :]
        p = tl.exp2(score - anchor[None, :])
        weights = weights * shrink + p
        if row.CODE != NONE:
            p *= scale[:, None]
        top = new_top
        # Once more, from the second-level cache: each product takes words in an order of its own,
        # and Triton copies ahead what has one use.
        words = _words(row, keys, CHUNKS, True)
        acc = _added(acc, words, p.to(ROW_NUMBER), shrink, bad, row, scoring.HIDES, scoring.OLD)
    return acc, top, tl.sum(weights, 0)


@triton.jit
def store(to, acc, ratio, real, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows of output at ``to``."""
    WIDTH: tl.constexpr = acc[0].shape[0]
    for i in tl.static_range(len(acc)):
        channel = tl.arange(0, WIDTH) * PARTS + (i // PARTS * WIDTH * PARTS + i % PARTS)
        mask = real[None, :] & (channel < D)[:, None]
        made = acc[i] * ratio[None, :]
        tl.store(to[None, :] + channel[:, None], made.to(to.dtype.element_ty), mask)
