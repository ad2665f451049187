"""The kernel of the write: bias, norm, rotation, key map, Hadamard, quantize, scatter.

A program takes a tile of rows of K or V, or a few tiles of Q that share their angles. Everything
stays in float32 registers between the projection and the code. Rows are cut into pieces, so that a
thread holds a few neighbours of each: the pairs of a rotation, and most neighbours of the Hadamard
stages, are then its own registers.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.rope_write.triton_products import (
    hadamard_products,
    signs_of,
    turn_factors,
    turned_by_products,
    widened,
)
from quantpage.ops.rope_write.triton_rows import (
    scaled,
    store_parts,
    write_exact,
    write_near,
    write_rows,
)
from quantpage.ops.triton.hadamard import between_pieces, hadamard


class Pages(NamedTuple):
    """K or V of a layer as the kernel writes them; strides in elements of what they are of."""

    codes: Any
    scale: Any
    zero: Any
    exact: Any
    """Exact pages of numbers, or what stands in for them."""
    page: Any
    """From page to page."""
    head: Any
    """From kv_head to kv_head."""
    scale_page: Any
    scale_head: Any
    exact_page: Any
    exact_head: Any


@triton.jit
def load_parts(x, at, real, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr):
    """Rows as they are in memory, a tuple of pieces [ROWS, PIECE]."""
    parts = ()
    for i in tl.static_range((HEAD_DIM + PIECE - 1) // PIECE):
        channel = i * PIECE + tl.arange(0, PIECE)
        mask = real[:, None]
        if (i + 1) * PIECE > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM)[None, :]
        parts = parts + (tl.load(x + at[:, None] + channel[None, :], mask, 0.0),)
    return parts


@triton.jit
def _biased(loaded, bias, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, BIAS: tl.constexpr):
    """Float32, with bias."""
    parts = ()
    for i in tl.static_range(len(loaded)):
        part = widened(loaded[i])
        if BIAS:
            channel = i * PIECE + tl.arange(0, PIECE)
            inside = (channel < HEAD_DIM)[None, :]
            part += tl.load(bias[:, None] + channel[None, :], inside, 0.0).to(tl.float32)
        parts = parts + (part,)
    return parts


@triton.jit
def _ratio(parts, eps, HEAD_DIM: tl.constexpr):
    """1 / root mean square of rows: [ROWS]."""
    squares = parts[0] * parts[0]
    for i in tl.static_range(1, len(parts)):
        squares += parts[i] * parts[i]
    mean = tl.sum(squares, 1) / HEAD_DIM
    return tl.math.div_rn(mean * 0.0 + 1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _normalized(parts, ratio, weight, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr):
    done = ()
    for i in tl.static_range(len(parts)):
        channel = i * PIECE + tl.arange(0, PIECE)
        gain = tl.load(weight + channel, channel < HEAD_DIM, 0.0).to(tl.float32)
        done = done + (parts[i] * ratio[:, None] * gain[None, :],)
    return done


@triton.jit
def _mapped(
    parts, scale, mean, QUERY: tl.constexpr, MAPPED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """The key map of rows' heads, at ``scale`` and ``mean`` [ROWS]; of queries a scale alone, which
    undoes it.
    """
    done = ()
    for i in tl.static_range(len(parts)):
        channel = i * PIECE + tl.arange(0, PIECE)
        inside = (channel < HEAD_DIM)[None, :]
        by = tl.load(scale[:, None] + channel[None, :], inside, 1.0)
        if MAPPED == 2 and not QUERY:
            done = done + (
                (parts[i] - tl.load(mean[:, None] + channel[None, :], inside, 0.0)) * by,
            )
        else:
            done = done + (parts[i] * by,)
    return done


@triton.jit
def _partner(channel, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other channel of each pair, the pair's angle, and the sign of the other in the sum."""
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        other = channel ^ 1
        angle = channel // 2
        sign = tl.where(channel % 2 == 0, -1.0, 1.0)
    else:
        other = tl.where(channel < HALF, channel + HALF, channel - HALF)
        angle = tl.where(channel < HALF, channel, channel - HALF)
        sign = tl.where(channel < HALF, -1.0, 1.0)
    return tl.where(channel < ROTARY, other, channel), angle, sign


@triton.jit
def angles_of(
    cos, sin, where, real, gain: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAIRED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of the pieces, times ``gain``; PAIRED: of the first half of them.

    FOLD: cos + sin and cos - sin in their place: a rotation and the Hadamard stage of its pairs
    are one.
    """
    cosine = ()
    sine = ()
    PARTS: tl.constexpr = (HEAD_DIM + PIECE - 1) // PIECE if ROTARY > 0 else 0
    for i in tl.static_range(PARTS // 2 if PAIRED else PARTS):
        channel = i * PIECE + tl.arange(0, PIECE)
        if PAIRED:
            at = where[:, None] + channel[None, :]
            c = tl.load(cos + at, real[:, None], 0.0).to(tl.float32)
            s = tl.load(sin + at, real[:, None], 0.0).to(tl.float32)
            if FOLD:
                cosine = cosine + ((c + s) * gain,)
                sine = sine + ((c - s) * gain,)
            else:
                cosine = cosine + (c * gain,)
                sine = sine + (s * gain,)
        else:
            _, angle, sign = _partner(channel, ROTARY, INTERLEAVED)
            at = where[:, None] + angle[None, :]
            mask = real[:, None] & (channel < ROTARY)[None, :]
            cosine = cosine + (tl.load(cos + at, mask, 1.0).to(tl.float32) * gain,)
            sign = (sign * gain)[None, :]
            sine = sine + (tl.load(sin + at, mask, 0.0).to(tl.float32) * sign,)
    return cosine, sine


@triton.jit
def _pairs_turned(parts, cosine, sine, FOLD: tl.constexpr):
    """Half-split pairs of whole rows: both channels of a pair are in one thread.

    FOLD: their sum and difference in place of both, from sums and differences of the angles.
    """
    HALF: tl.constexpr = len(parts) // 2
    turned = ()
    for i in tl.static_range(HALF):
        if FOLD:
            turned = turned + (parts[i] * cosine[i] + parts[i + HALF] * sine[i],)
        else:
            turned = turned + (parts[i] * cosine[i] - parts[i + HALF] * sine[i],)
    for i in tl.static_range(HALF):
        if FOLD:
            turned = turned + (parts[i] * sine[i] - parts[i + HALF] * cosine[i],)
        else:
            turned = turned + (parts[i + HALF] * cosine[i] + parts[i] * sine[i],)
    return turned


@triton.jit
def _hadamard(
    parts, signs, ROWS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    FOLDED: tl.constexpr, PRODUCTS: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    if PRODUCTS:
        parts = hadamard_products(parts, signs, GUARD)
        return between_pieces(parts, (BLOCK // PIECE).bit_length() - 1 - FOLDED)
    else:
        return hadamard(parts, ROWS, PIECE, BLOCK, FOLDED)


@triton.jit
def turned_parts(
    loaded, x, at, cosine, sine, signs, bias, weight, map_scale, map_mean, eps, real,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, FOLD: tl.constexpr, PRODUCTS: tl.constexpr, QUERY: tl.constexpr,
    MAPPED: tl.constexpr,
):  # fmt: skip
    """Rows of Q or K, as loaded from ``x``, in the basis of the cache.

    NORM: 0 none, 1 before the rotation, 2 after. MAPPED: 0 no key map, 1 scales, 2 means too. With
    a rotation and neither a norm nor a map after it, the angles carry the Hadamard matrix's factor.
    """
    parts = _biased(loaded, bias, HEAD_DIM, PIECE, BIAS)
    ratio = eps
    if NORM == 1:
        ratio = _ratio(parts, eps, HEAD_DIM)
        parts = _normalized(parts, ratio, weight, HEAD_DIM, PIECE)
    if PAIRED:
        parts = _pairs_turned(parts, cosine, sine, FOLD)
    elif ROTARY > 0:
        turned = ()
        for i in tl.static_range(len(parts)):
            channel = i * PIECE + tl.arange(0, PIECE)
            # The other channel of each pair, from the cache of this multiprocessor.
            partner, _, _ = _partner(channel, ROTARY, INTERLEAVED)
            inside = channel < HEAD_DIM
            mask = real[:, None] & inside[None, :]
            other = tl.load(x + at[:, None] + partner[None, :], mask, 0.0).to(tl.float32)
            if BIAS:
                at_bias = bias[:, None] + partner[None, :]
                other += tl.load(at_bias, inside[None, :], 0.0).to(tl.float32)
            if NORM == 1:
                gain = tl.load(weight + partner, inside, 0.0).to(tl.float32)
                other = other * ratio[:, None] * gain[None, :]
            turned = turned + (parts[i] * cosine[i] + other * sine[i],)
        parts = turned
    if NORM == 2:
        parts = _normalized(parts, _ratio(parts, eps, HEAD_DIM), weight, HEAD_DIM, PIECE)
    if MAPPED > 0:
        parts = _mapped(parts, map_scale, map_mean, QUERY, MAPPED, HEAD_DIM, PIECE)
    if BLOCK > 1:
        parts = _hadamard(parts, signs, ROWS, PIECE, BLOCK, FOLD, PRODUCTS, not QUERY)
        if ROTARY == 0 or NORM == 2 or MAPPED > 0:
            parts = scaled(parts, 1.0 / (BLOCK**0.5))
    return parts


@triton.jit(do_not_specialize=["tokens", "q_heads", "kv_heads"])
def write_kernel(
    q, k, v, q_out, k_seen, v_seen,
    k_pages, v_pages,
    slots, exact_slots, positions, cos, sin, q_weight, k_weight, q_bias, k_bias, v_bias,
    map_scale, map_undone, map_mean, eps, tokens, q_heads, kv_heads,
    q_token, q_head, k_token, k_head, v_token, v_head,
    angle_row, k_near, v_near,
    K_CODE: tl.constexpr, K_SCALES: tl.constexpr, K_ZERO: tl.constexpr, K_SHARED: tl.constexpr,
    K_LIMIT: tl.constexpr, K_BLOCK: tl.constexpr,
    V_CODE: tl.constexpr, V_SCALES: tl.constexpr, V_ZERO: tl.constexpr, V_SHARED: tl.constexpr,
    V_LIMIT: tl.constexpr, V_BLOCK: tl.constexpr,
    K_NEAR_CODE: tl.constexpr, K_NEAR_ZERO: tl.constexpr, K_NEAR_SHARED: tl.constexpr,
    K_NEAR_LIMIT: tl.constexpr,
    V_NEAR_CODE: tl.constexpr, V_NEAR_ZERO: tl.constexpr, V_NEAR_SHARED: tl.constexpr,
    V_NEAR_LIMIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, VALUE_DIM: tl.constexpr, V_PIECE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    MAPPED: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr, RETURN: tl.constexpr,
    HARDWARE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    HEADS_FIRST: tl.constexpr, PRODUCTS: tl.constexpr, V_PRODUCTS: tl.constexpr,
    KEYS: tl.constexpr, MADE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS rows: HEADS neighbouring heads of each of its tokens.

    A program has one tile of K or of V, or TILES of Q, which share their angles. What comes from
    far is loaded first, all of it. k_near, v_near: exact pages that are codes, or None. KEYS: False
    where K is written by somebody else. MADE: the launch before makes K, and V is all that is here.
    """
    if OVERLAP:
        # Launched while the launch before ends; what that wrote is read from here on.
        if not MADE:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(1 if HEADS_FIRST else 0)
    part = tl.program_id(0 if HEADS_FIRST else 1)
    row = tl.arange(0, ROWS)
    token = tile * (ROWS // HEADS) + row // HEADS
    # One token a tile: no tile has rows past the last token, and no load a mask.
    real = tl.full([ROWS], 1, tl.int1) if ROWS == HEADS else token < tokens
    wide = token.to(tl.int64)
    kv_parts = kv_heads // HEADS
    if not KEYS:
        part += kv_parts
    PAIRED: tl.constexpr = ROTARY == HEAD_DIM and HEAD_DIM % (2 * PIECE) == 0 and not INTERLEAVED
    # Factors of a rotation commute with it, of a norm or a map after it do not.
    LAST: tl.constexpr = NORM != 2 and MAPPED == 0
    GAIN: tl.constexpr = 1.0 / (K_BLOCK**0.5) if LAST else 1.0
    FOLD: tl.constexpr = PAIRED and K_BLOCK == HEAD_DIM and LAST
    # K and V take longest and start first.
    if part >= 2 * kv_parts:
        PARTS: tl.constexpr = (HEAD_DIM + PIECE - 1) // PIECE
        TURNS: tl.constexpr = (
            PRODUCTS and FOLD and NORM == 0 and not BIAS and HEADS == 8 and TILES % 2 == 0
        )
        first = (part - 2 * kv_parts) * (TILES * HEADS) + row % HEADS
        loaded = ()
        for i in tl.static_range(TILES):
            head = first + i * HEADS
            here = real & (head < q_heads) if TILES > 1 else real
            at = wide * q_token + head.to(tl.int64) * q_head
            loaded = loaded + load_parts(q, at, here, HEAD_DIM, PIECE)
        # Or the compiler loads rows only when positions have come.
        tl.debug_barrier()
        where = positions_of(positions, token, real, angle_row, ROTARY)
        if TURNS:
            factors = turn_factors(cos, sin, where, ROWS, GAIN, HEAD_DIM, q.dtype.element_ty)
            for i in tl.static_range(TILES // 2):
                both = turned_by_products(
                    loaded[2 * i * PARTS : (2 * i + 1) * PARTS],
                    loaded[(2 * i + 1) * PARTS : (2 * i + 2) * PARTS],
                    factors,
                )
                for j in tl.static_range(2):
                    head = first + (2 * i + j) * HEADS
                    parts = between_pieces(
                        both[j * PARTS : (j + 1) * PARTS], (K_BLOCK // PIECE).bit_length() - 2
                    )
                    to = q_out + (wide * q_heads + head) * HEAD_DIM
                    store_parts(to, parts, real & (head < q_heads), HEAD_DIM, PIECE)
        else:
            cosine, sine = angles_of(
                cos, sin, where, real, GAIN, ROTARY, INTERLEAVED, HEAD_DIM, PIECE, PAIRED, FOLD
            )
            signs = real
            if PRODUCTS:
                signs = signs_of(ROWS, tl.float32)
            group = q_heads // kv_heads
            for i in tl.static_range(TILES):
                head = first + i * HEADS
                here = real & (head < q_heads) if TILES > 1 else real
                # Rows past the last head have no map.
                kept = tl.minimum(head, q_heads - 1)
                parts = turned_parts(
                    loaded[i * PARTS : (i + 1) * PARTS], q,
                    wide * q_token + head.to(tl.int64) * q_head,
                    cosine, sine, signs, q_bias + head * HEAD_DIM, q_weight,
                    map_undone + kept // group * HEAD_DIM, map_mean, eps, here,
                    HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED, PAIRED, K_BLOCK,
                    FOLD, PRODUCTS, True, MAPPED,
                )  # fmt: skip
                to = q_out + (wide * q_heads + head) * HEAD_DIM
                store_parts(to, parts, here, HEAD_DIM, PIECE)
    elif part < kv_parts:
        if KEYS:
            narrow = part * HEADS + row % HEADS
            kv_head = narrow.to(tl.int64)
            at = wide * k_token + kv_head * k_head
            loaded = load_parts(k, at, real, HEAD_DIM, PIECE)
            # Or the compiler loads rows only when positions have come.
            tl.debug_barrier()
            where = positions_of(positions, token, real, angle_row, ROTARY)
            slot, near = slots_of(slots, exact_slots, token, real, EXACT)
            cosine, sine = angles_of(
                cos, sin, where, real, GAIN, ROTARY, INTERLEAVED, HEAD_DIM, PIECE, PAIRED, FOLD
            )
            signs = real
            if PRODUCTS:
                signs = signs_of(ROWS, tl.float32)
            parts = turned_parts(
                loaded, k, at, cosine, sine, signs, k_bias + narrow * HEAD_DIM, k_weight,
                map_scale + narrow * HEAD_DIM, map_mean + narrow * HEAD_DIM, eps, real,
                HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED, PAIRED, K_BLOCK,
                FOLD, PRODUCTS, False, MAPPED,
            )  # fmt: skip
            if k_near is not None:
                write_near(
                    parts, near, kv_head, k_near, K_NEAR_CODE, K_NEAR_ZERO, K_NEAR_SHARED, HEAD_DIM,
                    PIECE, PAGE, ROWS, K_NEAR_LIMIT, HARDWARE, K_BLOCK > 1, 1.0,
                )  # fmt: skip
            elif EXACT:
                write_exact(
                    parts,
                    near,
                    kv_head,
                    k_pages.exact,
                    k_pages.exact_page,
                    k_pages.exact_head,
                    HEAD_DIM,
                    PIECE,
                    PAGE,
                )
            write_rows(
                parts, real, slot, kv_head, k_pages.codes, k_pages.scale, k_pages.zero,
                k_pages.page, k_pages.head, k_pages.scale_page, k_pages.scale_head,
                k_seen + (wide * kv_heads + kv_head) * HEAD_DIM,
                K_CODE, K_SCALES, K_ZERO, K_SHARED, HEAD_DIM, PIECE, PAGE, ROWS, K_LIMIT, HARDWARE,
                RETURN, K_BLOCK > 1, 1.0,
            )  # fmt: skip
    else:
        kv_head = ((part - kv_parts) * HEADS + row % HEADS).to(tl.int64)
        v_parts = load_parts(v, wide * v_token + kv_head * v_head, real, VALUE_DIM, V_PIECE)
        slot, near = slots_of(slots, exact_slots, token, real, EXACT)
        if BIAS or not V_PRODUCTS:
            v_parts = _biased(v_parts, v_bias + kv_head * VALUE_DIM, VALUE_DIM, V_PIECE, BIAS)
        v_signs = real
        if V_PRODUCTS:
            v_signs = signs_of(ROWS, v_parts[0].dtype)
        V_GAIN: tl.constexpr = 1.0 / (V_BLOCK**0.5)
        if V_BLOCK > 1:
            v_parts = _hadamard(v_parts, v_signs, ROWS, V_PIECE, V_BLOCK, False, V_PRODUCTS, True)
        if v_near is not None:
            write_near(
                v_parts, near, kv_head, v_near, V_NEAR_CODE, V_NEAR_ZERO, V_NEAR_SHARED, VALUE_DIM,
                V_PIECE, PAGE, ROWS, V_NEAR_LIMIT, HARDWARE, V_BLOCK > 1, V_GAIN,
            )  # fmt: skip
        elif EXACT:
            write_exact(
                scaled(v_parts, V_GAIN), near, kv_head, v_pages.exact, v_pages.exact_page,
                v_pages.exact_head, VALUE_DIM, V_PIECE, PAGE,
            )  # fmt: skip
        write_rows(
            v_parts, real, slot, kv_head, v_pages.codes, v_pages.scale, v_pages.zero, v_pages.page,
            v_pages.head, v_pages.scale_page, v_pages.scale_head,
            v_seen + (wide * kv_heads + kv_head) * VALUE_DIM,
            V_CODE, V_SCALES, V_ZERO, V_SHARED, VALUE_DIM, V_PIECE, PAGE, ROWS, V_LIMIT, HARDWARE,
            RETURN, V_BLOCK > 1, V_GAIN,
        )  # fmt: skip
    if OVERLAP and MADE:
        # Who waits for this launch has to find the one before done as well.
        tl.extra.cuda.gdc_wait()


@triton.jit
def positions_of(positions, token, real, angle_row, ROTARY: tl.constexpr):
    """Where each token's angles begin."""
    where = token.to(tl.int64)
    if ROTARY > 0:
        where = tl.load(positions + token, real, 0).to(tl.int64) * angle_row
    return where


@triton.jit
def slots_of(slots, exact_slots, token, real, EXACT: tl.constexpr):
    """Of tokens, in pages of codes and in exact pages."""
    slot = tl.load(slots + token, real, -1)
    near = slot
    if EXACT:
        near = tl.load(exact_slots + token, real, -1)
    return slot, near
