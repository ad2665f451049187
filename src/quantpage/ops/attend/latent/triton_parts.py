"""Latent rows from pages to the running softmax: what the kernels of decode and of prefill share.

A key is a latent row and the rotary channels after it, a value the row alone, so that a tile of
codes is loaded once and used in both products. Codes become float16 exactly and no scale touches
one: both halves have one scale a token, which enters the columns of scores,

    S = (q_row . row) * scale[token] + (q_rotary . rotary) * rotary scale[token]
    O = sum (p * scale[token]) row

All query heads read the same rows, so a tile of queries is heads of a token (and of its
neighbours): 16 to 64 rows against a tile of keys. Queries are scaled by a power of two, a row by
itself, so that float16 holds whatever is asked, and p so that the largest p * scale is 2^SHIFT.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_share import (
    key_ranges,
    keys_of_all,
    shown_keys,
    tile_ranges,
)
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.triton.common import LOG2E
from quantpage.ops.triton.words import load_plane


class Plane(NamedTuple):
    """The rows of all tokens, or their rotary channels."""

    codes: Any
    scale: Any
    page: Any
    """From page to page, in elements of codes."""
    scale_page: Any
    D: tl.constexpr
    """Channels."""
    DP: tl.constexpr
    """Channels of a tile, a power of two."""
    CODE: tl.constexpr


class Scoring(NamedTuple):
    """How scores become probabilities, and which keys a query sees."""

    softmax_scale: Any
    softcap: Any
    window: Any
    sink_tokens: Any
    FULL: tl.constexpr
    WINDOW: tl.constexpr
    SOFTCAP: tl.constexpr
    SHIFT: tl.constexpr
    """log2 of the largest probability times its scale: float16 neither overflows nor flushes."""
    PAIRS: tl.constexpr
    """Scales are read two tokens a word."""
    HIDES: tl.constexpr
    """Rows are 16-bit numbers, and a query may see one that another does not."""
    OLD: tl.constexpr
    """No e4m3 conversion instruction (before sm_89)."""


class Spans(NamedTuple):
    """Which keys some and which keys all of a row's queries see (decode/triton_share)."""

    a_low: Any
    a_high: Any
    b_low: Any
    b_high: Any
    a_first: Any
    """Tile."""
    a_tiles: Any
    b_first: Any
    """Tile."""
    first_seat: Any
    """Position of the first query."""
    all_low: Any
    all_high: Any


class Keys(NamedTuple):
    """A tile of keys: where they lie."""

    key: Any
    shown: Any
    """Keys that some query sees."""
    page: Any
    slot: Any
    pair_page: Any
    """Of each two neighbours, whose scales are one word."""
    pair_slot: Any
    masked: Any
    """Whether some query does not see some of them."""


@triton.jit
def find_spans(context, new, scoring, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Of the ``new`` last tokens of ``context``."""
    a_low, a_high, b_low, b_high = key_ranges(
        context, new, scoring.window, scoring.sink_tokens, PAGE, scoring.FULL, scoring.WINDOW,
        ALL_KEYS,
    )  # fmt: skip
    a_first, a_tiles, b_first, _ = tile_ranges(a_low, a_high, b_low, b_high, TILE)
    first_seat = context - new
    all_low, all_high = keys_of_all(
        context, first_seat, scoring.window, PAGE, scoring.FULL, scoring.WINDOW, ALL_KEYS
    )
    return Spans(
        a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, first_seat, all_low, all_high
    )


@triton.jit
def find_keys(table, t, spans, scoring, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Tile number ``t`` of a row."""
    tile = spans.b_first + t
    if scoring.WINDOW:
        tile = tl.where(t < spans.a_tiles, spans.a_first + t, spans.b_first + t - spans.a_tiles)
    key_start = tile * TILE
    pair = tl.arange(0, TILE // 2)
    key = key_start + tl.arange(0, TILE)
    shown = shown_keys(
        key, spans.a_low, spans.a_high, spans.b_low, spans.b_high, spans.first_seat, scoring.window,
        scoring.sink_tokens, scoring.WINDOW, ALL_KEYS,
    )  # fmt: skip
    if PAGE >= TILE:
        page = tl.load(table + key_start // PAGE).to(tl.int64)
        slot = key_start % PAGE + tl.arange(0, TILE)
        pair_page = page
        pair_slot = key_start % PAGE + 2 * pair
    else:
        page = tl.load(table + key // PAGE, shown, 0).to(tl.int64)
        slot = key % PAGE
        pair_page = page
        pair_slot = pair
        if scoring.PAIRS:
            pair_key = key_start + 2 * pair
            pair_shown = shown_keys(
                pair_key, spans.a_low, spans.a_high, spans.b_low, spans.b_high, spans.first_seat,
                scoring.window, scoring.sink_tokens, scoring.WINDOW, ALL_KEYS,
            ) | shown_keys(
                pair_key + 1, spans.a_low, spans.a_high, spans.b_low, spans.b_high,
                spans.first_seat, scoring.window, scoring.sink_tokens, scoring.WINDOW, ALL_KEYS,
            )  # fmt: skip
            pair_page = tl.load(table + pair_key // PAGE, pair_shown, 0).to(tl.int64)
            pair_slot = pair_key % PAGE
    masked = (key_start < spans.all_low) | (key_start + TILE > spans.all_high)
    return Keys(key, shown, page, slot, pair_page, pair_slot, masked)


@triton.jit
def load_scales(plane, keys, PAIRS: tl.constexpr):
    """One a key, float32."""
    pair_at = 0
    if PAIRS:
        pair_at = (keys.pair_page * plane.scale_page + keys.pair_slot) // 2
    page_at = keys.page * plane.scale_page
    return load_plane(plane.scale, page_at, keys.slot, pair_at, keys.shown, PAIRS)


@triton.jit
def bent(score, scoring):
    """Scores, natural where they are capped, as powers of two under the cap."""
    if scoring.SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends.
        power = tl.exp2(score * (2.0 * LOG2E / scoring.softcap))
        score = (scoring.softcap * LOG2E) * (1.0 - 2.0 / (1.0 + power))
    return score


@triton.jit
def seen_by(key, seat, shown, scoring):
    """Which pairs the mask shows; key, seat and shown broadcast."""
    seen = shown
    if not scoring.FULL:
        seen = seen & (key <= seat)
    if scoring.WINDOW:
        seen = seen & ((key > seat - scoring.window) | (key < scoring.sink_tokens))
    return seen


@triton.jit
def power_of_two(high, ROW_NUMBER: tl.constexpr, ROTARY_NUMBER: tl.constexpr):
    """What queries are multiplied by for float16, of each row's largest size: it rounds nothing,
    and brings that to 2^14 .. 2^15.
    """
    power = (high.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(high > 1e-30, 16384.0 / tl.maximum(power, 1e-30), 1.0)
    if tl.float16 != ROW_NUMBER and tl.float16 != ROTARY_NUMBER:
        unit = unit * 0.0 + 1.0
    return unit


@triton.jit
def sums(top, total, SHIFT: tl.constexpr):
    """log2-sum-exp of rows, and what outputs are multiplied by; -inf and 0 of nothing."""
    some = total != 0
    safe = tl.where(some, total, 1.0)
    row_lse = tl.where(some, top - SHIFT + tl.log2(safe), float("-inf"))
    return row_lse, tl.where(some, 1.0 / safe, 0.0)


@triton.jit
def with_sink(row_lse, ratio, sinks, head, real):
    """The same with one more key, which has no value."""
    sink = tl.load(sinks + head, real, 0.0).to(tl.float32) * LOG2E
    peak = tl.maximum(row_lse, sink)
    whole = peak + tl.log2(tl.exp2(row_lse - peak) + tl.exp2(sink - peak))
    return whole, ratio * tl.exp2(row_lse - whole)
