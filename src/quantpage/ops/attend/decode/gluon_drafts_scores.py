"""What the Hopper kernel of many query rows makes of its products: logarithms of probabilities.

Rows lie side by side, [rows, keys]; what a row or a key is known by is worked out before
(gluon_drafts_operands).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_drafts_operands import whole_scores
from quantpage.ops.attend.decode.gluon_rows import capped, seen_rows
from quantpage.ops.triton.common import A_TOKEN, INT4


@gluon.jit
def by_lane(x):
    """[rows, keys] summed over the keys of a thread: [rows, lanes of a row]."""
    ROWS: gl.constexpr = x.shape[0]
    return gl.sum(gl.sum(gl.reshape(x, [ROWS, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _peaks(x):
    """The largest of each row's keys that a thread has, [rows, lanes of a row]."""
    ROWS: gl.constexpr = x.shape[0]
    return gl.max(gl.max(gl.reshape(x, [ROWS, x.shape[1] // 8, 4, 2]), 3), 1)


class Weighing(NamedTuple):
    """What makes scores of products: a row's numbers, and what its mask goes by."""

    factor: Any
    less: Any
    """Added to a score when its scale is a channel's: what 4-bit codes are too large by, zeros."""
    q_sum: Any
    all_low: Any
    all_high: Any
    shown: Any
    row_first: Any
    q_len: Any
    softcap: Any


@gluon.jit
def weigh(
    high, low, given, beside, less, limit, far_smem, key_start, s_layout: gl.constexpr,
    FIXED: gl.constexpr,
):  # fmt: skip
    """Logarithms of a tile's p as they are multiplied, -inf where the mask hides; far_smem says how
    far above its row's limit one is. less: what is taken off a row's scores. beside: numbers of the
    tile's keys.
    """
    ROWS: gl.constexpr = FIXED.ROWS
    TILE: gl.constexpr = FIXED.TILE
    KEYS_ADD: gl.constexpr = FIXED.K_ZERO or FIXED.K_CODE == INT4
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_keys: gl.constexpr = gl.SliceLayout(0, s_layout)
    score = whole_scores(high, low, ROWS).to(gl.float32)
    score = gl.convert_layout(score, s_layout, assert_trivial=True) * given.factor[:, None]
    # What is added is summed first: then it is one operation with the product.
    added = 0.0 - less[:, None]
    if FIXED.SOFTCAP:
        added = gl.full([ROWS, 1], 0.0, gl.float32, s_layout)
    if FIXED.K_SCALES == A_TOKEN:
        if KEYS_ADD:
            added = given.q_sum[:, None] * beside.k_zero.load(s_keys)[None, :] + added
        score = score * beside.k_scale.load(s_keys)[None, :] + added
    else:
        if KEYS_ADD:
            added += given.less[:, None]
        score += added
    if FIXED.SOFTCAP:
        score = capped(score, given.softcap) - less[:, None]
    heavy = score
    if (key_start < given.all_low) | (key_start + TILE > given.all_high):
        key = key_start + gl.arange(0, TILE, s_keys)
        visible = seen_rows(
            key, given.shown, given.row_first, s_rows, given.q_len, FIXED.PAGE, ROWS, FIXED.GROUP,
            FIXED.FULL, FIXED.WINDOW, FIXED.SEGMENT,
        )  # fmt: skip
        heavy = gl.where(visible, heavy, float("-inf"))
    peak = _peaks(heavy)
    lanes: gl.constexpr = gl.SliceLayout(1, peak.type.layout)
    above = peak - gl.convert_layout(limit, lanes)[:, None]
    bits = gl.reshape(above.to(gl.int32, bitcast=True), [4, ROWS])
    far_smem.store(gl.max(bits, 1))
    return heavy
