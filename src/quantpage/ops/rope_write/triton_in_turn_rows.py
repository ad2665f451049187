"""What both kernels of keys that are rounded in turn do to rows before and after.

They differ in where a row lies while it is rounded: triton_in_turn_kernel, triton_in_turn_lanes.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from quantpage.ops.rope_write.triton_kernel import (
    angles_of,
    load_parts,
    positions_of,
    turned_parts,
)
from quantpage.ops.rope_write.triton_products import signs_of
from quantpage.ops.rope_write.triton_rows import (
    finite,
    larger,
    rounded_scales,
    smaller,
    write_exact,
    write_near,
)
from quantpage.ops.triton.codes import largest, smallest
from quantpage.ops.triton.common import FP8


@triton.constexpr_function
def _rest(factor):
    return 1.0 - factor


@triton.jit
def asked_for(at):
    """The lines of these addresses are in the cache of the multiprocessor when they are needed."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def turned_keys(
    k, token, real, near, pages, near_pages, positions, cos, sin, weight, bias, map_scale, map_mean,
    eps, kv_head, k_token, k_head, angle_row, HADAMARD: tl.constexpr, NEAR_CODE: tl.constexpr,
    NEAR_ZERO: tl.constexpr, NEAR_SHARED: tl.constexpr, NEAR_LIMIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, PAGE: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr, PRODUCTS: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Rows of tokens in the basis of the cache, finite, with the largest and smallest of each.

    To exact pages too, those that are not codes in turn. near: their slots. BOTH: the smallest
    number is asked for, not just the largest size.
    """
    PAIRED: tl.constexpr = ROTARY == HEAD_DIM and HEAD_DIM % (2 * PIECE) == 0 and not INTERLEAVED
    at = token.to(tl.int64) * k_token + kv_head * k_head
    # What comes from far is asked for first: rows before positions have come.
    loaded = load_parts(k, at, real, HEAD_DIM, PIECE)
    where = positions_of(positions, token, real, angle_row, ROTARY)
    cosine, sine = angles_of(
        cos, sin, where, real, 1.0, ROTARY, INTERLEAVED, HEAD_DIM, PIECE, PAIRED, False
    )
    of_head = kv_head * HEAD_DIM + token * 0
    signs = real
    if PRODUCTS:
        signs = signs_of(ROWS, tl.float32)
    parts = turned_parts(
        loaded, k, at, cosine, sine, signs, bias + of_head, weight, map_scale + of_head,
        map_mean + of_head, eps, real, HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED,
        PAIRED, HADAMARD, False, PRODUCTS, False, MAPPED,
    )  # fmt: skip
    if EXACT and near_pages is None:
        write_exact(
            parts, near, kv_head, pages.exact, pages.exact_page, pages.exact_head, HEAD_DIM, PIECE,
            PAGE,
        )  # fmt: skip
    elif NEAR_CODE == FP8:
        # A code of fp8 has no next one at an equal distance.
        write_near(
            parts, near, kv_head, near_pages, NEAR_CODE, NEAR_ZERO, NEAR_SHARED, HEAD_DIM, PIECE,
            PAGE, ROWS, NEAR_LIMIT, HARDWARE, HADAMARD > 1, 1.0,
        )  # fmt: skip
    high, low = _reach(parts, HEAD_DIM, PIECE, BOTH)
    if tl.max(tl.where((high < float("inf")) & (low > float("-inf")), 0, 1), 0) != 0:
        known = ()
        for i in tl.static_range(len(parts)):
            known = known + (finite(parts[i]),)
        parts = known
        high, low = _reach(parts, HEAD_DIM, PIECE, BOTH)
    return parts, high, low


@triton.jit
def _reach(parts, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, BOTH: tl.constexpr):
    """Largest and smallest number of rows, NaN where one is; without BOTH the largest size."""
    high = parts[0] if BOTH else tl.abs(parts[0])
    low = parts[0]
    for i in tl.static_range(1, len(parts)):
        above = parts[i] if BOTH else tl.abs(parts[i])
        below = parts[i]
        if (i + 1) * PIECE > HEAD_DIM:
            inside = (i * PIECE + tl.arange(0, PIECE) < HEAD_DIM)[None, :]
            above = tl.where(inside, above, float("-inf"))
            below = tl.where(inside, below, float("inf"))
        high = larger(high, above)
        if BOTH:
            low = smaller(low, below)
    most = tl.reduce(high, 1, larger)
    least = -most
    if BOTH:
        least = tl.reduce(low, 1, smaller)
    return most, least


@triton.jit
def steps_of(
    top, bottom, number, scale, zero, ZERO: tl.constexpr, CODE: tl.constexpr, LIMIT: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    """Scale and zero of rows by their ranges, as float32. number: of a row's range."""
    factor = top * 0.0 + FACTORS[0]
    rest = top * 0.0 + _rest(FACTORS[0])
    for i in tl.static_range(1, len(FACTORS)):
        factor = tl.where(number == i, FACTORS[i], factor)
        rest = tl.where(number == i, _rest(FACTORS[i]), rest)
    return rounded_scales(
        top, bottom, factor, rest, scale, zero, ZERO, largest(CODE), smallest(CODE), LIMIT
    )


@triton.jit
def kept_of(
    loss, number, RANGES: tl.constexpr, TRIED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Which rows have the range of the least loss, and that loss; infinite where none is finite.

    TRIED rows a token, of which RANGES have ranges, ROWS / TRIED apart.
    """
    # A loss that is no number is never less.
    least = tl.where((number < RANGES) & (loss == loss), loss, float("inf"))
    keep = least < float("inf")
    if TRIED > 1:
        EACH: tl.constexpr = ROWS // TRIED
        tried = tl.reshape(least, [TRIED, EACH])
        best = tl.min(tried, 0)
        order = tl.arange(0, TRIED)[:, None]
        chosen = tl.min(tl.where(tried == best[None, :], order, TRIED), 0)
        chosen = tl.reshape(tl.broadcast_to(chosen[None, :], [TRIED, EACH]), [ROWS])
        least = tl.reshape(tl.broadcast_to(best[None, :], [TRIED, EACH]), [ROWS])
        keep = (number == chosen) & (least < float("inf"))
    return keep, least
