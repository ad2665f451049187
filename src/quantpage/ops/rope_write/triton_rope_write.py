"""The write of a step in one launch: bias, norm, rotation, Hadamard, quantize, scatter.

A program takes a few tokens and a few heads of Q, K or V; the angles of its tokens are read once
for all its heads. Everything stays in float32 registers between the projection and the code. Rows
are cut into pieces, so that a thread holds a few neighbours of each: the pairs of a rotation, and
most neighbours of the Hadamard stages, are then its own registers.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import QuantSpec, rotation_block
from quantpage.hardware import device_info
from quantpage.ops.rope_write.params import WriteParams, Written
from quantpage.ops.rope_write.reference import refuse_non_finite
from quantpage.ops.rope_write.triton_rows import store_parts, write_exact, write_rows
from quantpage.ops.triton_hadamard import hadamard

CODE_KINDS = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}


@triton.jit
def _loaded(
    x, at, bias, real, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Rows in float32, with bias, as a tuple of pieces [ROWS, PIECE]."""
    parts = ()
    for i in tl.static_range((HEAD_DIM + PIECE - 1) // PIECE):
        channel = i * PIECE + tl.arange(0, PIECE)
        mask = real[:, None]
        if (i + 1) * PIECE > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM)[None, :]
        row = tl.load(x + at[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
        if BIAS:
            row += tl.load(bias + channel, channel < HEAD_DIM, 0.0).to(tl.float32)[None, :]
        parts = parts + (row,)
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
def _angles(
    cos, sin, where, real, gain: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of the pieces, times ``gain``; PAIRED: of the first half of them."""
    cosine = ()
    sine = ()
    PARTS: tl.constexpr = (HEAD_DIM + PIECE - 1) // PIECE
    for i in tl.static_range(PARTS // 2 if PAIRED else PARTS):
        channel = i * PIECE + tl.arange(0, PIECE)
        if PAIRED:
            at = where[:, None] + channel[None, :]
            cosine = cosine + (tl.load(cos + at, real[:, None], 0.0).to(tl.float32) * gain,)
            sine = sine + (tl.load(sin + at, real[:, None], 0.0).to(tl.float32) * gain,)
        else:
            _, angle, sign = _partner(channel, ROTARY, INTERLEAVED)
            at = where[:, None] + angle[None, :]
            mask = real[:, None] & (channel < ROTARY)[None, :]
            cosine = cosine + (tl.load(cos + at, mask, 1.0).to(tl.float32) * gain,)
            sign = (sign * gain)[None, :]
            sine = sine + (tl.load(sin + at, mask, 0.0).to(tl.float32) * sign,)
    return cosine, sine


@triton.jit
def _pairs_turned(parts, cosine, sine):
    """Half-split pairs of whole rows: both channels of a pair are in one thread."""
    HALF: tl.constexpr = len(parts) // 2
    turned = ()
    for i in tl.static_range(HALF):
        turned = turned + (parts[i] * cosine[i] - parts[i + HALF] * sine[i],)
    for i in tl.static_range(HALF):
        turned = turned + (parts[i + HALF] * cosine[i] + parts[i] * sine[i],)
    return turned


@triton.jit
def _turned(
    x, at, cosine, sine, bias, weight, eps, real,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of Q or K in the basis of the cache. NORM: 0 none, 1 before the rotation, 2 after.

    With a rotation and no norm after it, the angles carry the Hadamard matrix's factor.
    """
    parts = _loaded(x, at, bias, real, HEAD_DIM, PIECE, BIAS)
    ratio = eps
    if NORM == 1:
        ratio = _ratio(parts, eps, HEAD_DIM)
        parts = _normalized(parts, ratio, weight, HEAD_DIM, PIECE)
    if PAIRED:
        parts = _pairs_turned(parts, cosine, sine)
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
                other += tl.load(bias + partner, inside, 0.0).to(tl.float32)[None, :]
            if NORM == 1:
                gain = tl.load(weight + partner, inside, 0.0).to(tl.float32)
                other = other * ratio[:, None] * gain[None, :]
            turned = turned + (parts[i] * cosine[i] + other * sine[i],)
        parts = turned
    if NORM == 2:
        parts = _normalized(parts, _ratio(parts, eps, HEAD_DIM), weight, HEAD_DIM, PIECE)
    if BLOCK > 1:
        parts = hadamard(parts, ROWS, PIECE, BLOCK)
        if ROTARY == 0 or NORM == 2:
            parts = _scaled(parts, 1.0 / (BLOCK**0.5))
    return parts


@triton.jit
def _scaled(parts, factor: tl.constexpr):
    done = ()
    for i in tl.static_range(len(parts)):
        done = done + (parts[i] * factor,)
    return done


@triton.jit(do_not_specialize=["tokens", "q_heads", "kv_heads", "heads_a_program"])
def _write_kernel(
    q, k, v, q_out, k_seen, v_seen,
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, k_exact, v_exact,
    slots, exact_slots, positions, cos, sin, q_weight, k_weight, q_bias, k_bias, v_bias,
    eps, tokens, q_heads, kv_heads, heads_a_program,
    q_token, q_head, k_token, k_head, v_token, v_head,
    k_page, k_page_head, k_scale_page, k_scale_head,
    v_page, v_page_head, v_scale_page, v_scale_head,
    k_exact_page, k_exact_head, v_exact_page, v_exact_head, angle_row,
    K_CODE: tl.constexpr, K_SCALES: tl.constexpr, K_ZERO: tl.constexpr, K_SHARED: tl.constexpr,
    K_LIMIT: tl.constexpr, K_BLOCK: tl.constexpr,
    V_CODE: tl.constexpr, V_SCALES: tl.constexpr, V_ZERO: tl.constexpr, V_SHARED: tl.constexpr,
    V_LIMIT: tl.constexpr, V_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, VALUE_DIM: tl.constexpr, V_PIECE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    PAGE: tl.constexpr, EXACT: tl.constexpr, RETURN: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    wide = token.to(tl.int64)
    part = tl.program_id(1)
    kv_parts = tl.cdiv(kv_heads, heads_a_program)
    # K and V take longest and start first.
    if part < kv_parts or part >= 2 * kv_parts:
        PAIRED: tl.constexpr = (
            ROTARY == HEAD_DIM and HEAD_DIM % (2 * PIECE) == 0 and not INTERLEAVED
        )
        # Factors of a rotation commute with it, of a norm after it do not.
        GAIN: tl.constexpr = 1.0 / (K_BLOCK**0.5) if NORM != 2 else 1.0
        cosine = ()
        sine = ()
        if ROTARY > 0:
            where = tl.load(positions + token, real, 0).to(tl.int64) * angle_row
            cosine, sine = _angles(
                cos, sin, where, real, GAIN, ROTARY, INTERLEAVED, HEAD_DIM, PIECE, PAIRED
            )
        if part >= 2 * kv_parts:
            first = (part - 2 * kv_parts) * heads_a_program
            for head in tl.range(first, tl.minimum(first + heads_a_program, q_heads)):
                parts = _turned(
                    q, wide * q_token + head * q_head, cosine, sine, q_bias + head * HEAD_DIM,
                    q_weight, eps, real,
                    HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED, PAIRED, K_BLOCK,
                )  # fmt: skip
                to = q_out + (wide * q_heads + head) * HEAD_DIM
                store_parts(to, parts, real, HEAD_DIM, PIECE)
        else:
            slot, near = _slots_of(slots, exact_slots, token, real, EXACT)
            first = part * heads_a_program
            for head in tl.range(first, tl.minimum(first + heads_a_program, kv_heads)):
                parts = _turned(
                    k, wide * k_token + head * k_head, cosine, sine, k_bias + head * HEAD_DIM,
                    k_weight, eps, real,
                    HEAD_DIM, PIECE, ROWS, BIAS, NORM, ROTARY, INTERLEAVED, PAIRED, K_BLOCK,
                )  # fmt: skip
                to = k_seen + (wide * kv_heads + head) * HEAD_DIM
                if EXACT:
                    write_exact(
                        parts, near, head, k_exact, k_exact_page, k_exact_head, HEAD_DIM, PIECE,
                        PAGE,
                    )  # fmt: skip
                write_rows(
                    parts, real, slot, head, k_codes, k_scale, k_zero, k_page, k_page_head,
                    k_scale_page, k_scale_head, to, K_CODE, K_SCALES, K_ZERO, K_SHARED,
                    HEAD_DIM, PIECE, PAGE, ROWS, K_LIMIT, HARDWARE, RETURN,
                )  # fmt: skip
    else:
        slot, near = _slots_of(slots, exact_slots, token, real, EXACT)
        first = (part - kv_parts) * heads_a_program
        for head in tl.range(first, tl.minimum(first + heads_a_program, kv_heads)):
            parts = _loaded(
                v, wide * v_token + head * v_head, v_bias + head * VALUE_DIM, real, VALUE_DIM,
                V_PIECE, BIAS,
            )  # fmt: skip
            if V_BLOCK > 1:
                parts = _scaled(hadamard(parts, ROWS, V_PIECE, V_BLOCK), 1.0 / (V_BLOCK**0.5))
            to = v_seen + (wide * kv_heads + head) * VALUE_DIM
            if EXACT:
                write_exact(
                    parts, near, head, v_exact, v_exact_page, v_exact_head, VALUE_DIM, V_PIECE,
                    PAGE,
                )  # fmt: skip
            write_rows(
                parts, real, slot, head, v_codes, v_scale, v_zero, v_page, v_page_head,
                v_scale_page, v_scale_head, to, V_CODE, V_SCALES, V_ZERO, V_SHARED,
                VALUE_DIM, V_PIECE, PAGE, ROWS, V_LIMIT, HARDWARE, RETURN,
            )  # fmt: skip


@triton.jit
def _slots_of(slots, exact_slots, token, real, EXACT: tl.constexpr):
    slot = tl.load(slots + token, real, -1)
    near = slot
    if EXACT:
        near = tl.load(exact_slots + token, real, -1)
    return slot, near


def launch_shape(tokens: int, width: int) -> tuple[int, int, int, int]:
    """Tokens and heads a program, channels a piece and warps, for rows of ``width`` channels.

    Many tokens: four pieces a row and 32 channels a thread leave two shuffles for a rotation of
    128. Few are spread over more threads.
    """
    whole = triton.next_power_of_2(width)
    if tokens <= 256:
        warps = whole // 64 if tokens <= 64 else whole // 128
        return 4, 1, max(32, whole // 2), max(1, warps)
    return 8, 2, max(32, whole // 4), max(1, whole // 128)


def _piece(spec: QuantSpec, width: int, wanted: int) -> int:
    """Channels a piece: at most ``wanted``, all of a row where scales are of its parts."""
    whole = triton.next_power_of_2(width)
    grouped = spec.quantized and spec.dynamic and spec.granularity.groups(width) > 1
    return whole if grouped else min(wanted, whole)


def rope_write(
    q: Float[Tensor, "tokens q_heads head_dim"] | None,
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads value_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: WriteParams,
    shape: tuple[int, int, int, int] | None = None,
) -> Written:
    """As ops/rope_write/reference.rope_write, in one launch; strides of tokens and heads are free.

    shape: tokens and heads a program, channels a piece, warps; None: ``launch_shape``.
    """
    if params.checked:
        refuse_non_finite(k, "key", params.layer)
        refuse_non_finite(v, "value", params.layer)
    tokens, kv_heads, width = k.shape
    value_width = v.shape[-1]
    q_heads = 0 if q is None else q.shape[1]
    q_out = None if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    seen = [torch.empty(t.shape, dtype=k.dtype, device=k.device) for t in (k, v)]
    k_seen, v_seen = seen if params.return_rows else (None, None)
    if tokens == 0:
        return Written(q_out, k_seen, v_seen)
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    exact = layer.exact() if batch.exact is not None and layer.exact_key is not None else None
    rope, norm = params.rope, params.norm
    bias = [b.contiguous() for b in params.bias or (k[:0], k[:0], k[:0])]
    rows, heads, piece, warps = shape or launch_shape(tokens, max(width, value_width))
    key, key_fixed = _half(layer.key, width)
    value, value_fixed = _half(layer.value, value_width)
    near_key, _ = (key, None) if exact is None else _half(exact.key, width)
    near_value, _ = (value, None) if exact is None else _half(exact.value, value_width)
    parts = triton.cdiv(q_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    _write_kernel[(triton.cdiv(tokens, rows), parts)](
        k if q is None else q,
        k,
        v,
        k if q_out is None else q_out,
        k if k_seen is None else k_seen,
        v if v_seen is None else v_seen,
        *key["planes"],
        *value["planes"],
        near_key["planes"][0],
        near_value["planes"][0],
        batch.slots,
        batch.slots if exact is None or batch.exact is None else batch.exact.slots,
        batch.positions,
        k if rope is None else rope.cos,
        k if rope is None else rope.sin,
        k if norm is None else norm.q_weight,
        k if norm is None else norm.k_weight,
        *bias,
        0.0 if norm is None else norm.eps,
        tokens,
        q_heads,
        kv_heads,
        heads,
        *((k.stride(0), k.stride(1)) if q is None else (q.stride(0), q.stride(1))),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *key["strides"],
        *value["strides"],
        *near_key["strides"][:2],
        *near_value["strides"][:2],
        0 if rope is None else rope.cos.stride(0),
        **{f"K_{name}": fixed for name, fixed in key_fixed.items()},
        **{f"V_{name}": fixed for name, fixed in value_fixed.items()},
        HEAD_DIM=width,
        PIECE=_piece(layer.key.spec, width, piece),
        VALUE_DIM=value_width,
        V_PIECE=_piece(layer.value.spec, value_width, piece),
        ROTARY=0 if rope is None else rope.rotary_dim,
        INTERLEAVED=rope is not None and rope.interleaved,
        NORM=0 if norm is None else (2 if norm.after_rope else 1),
        BIAS=params.bias is not None,
        PAGE=batch.page_size,
        EXACT=exact is not None,
        RETURN=params.return_rows,
        HARDWARE=k.is_cuda and (device_info(k.device).capability or (0,)) >= (8, 9),
        ROWS=rows,
        num_warps=warps,
    )
    return Written(q_out, k_seen, v_seen)


def _half(pages: QuantizedPages, width: int) -> tuple[dict, dict]:
    """Kernel arguments of the K or the V pages, and what is compiled in."""
    spec, codes, scale = pages.spec, pages.codes, pages.scale
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    if scale is None:
        kind, strides, shared = 0, (0, 0), 1
    elif spec.dynamic:
        kind, strides = 1, (scale.stride(0), scale.stride(1))
        groups = scale.shape[-1]
        shared = triton.next_power_of_2(width) if groups == 1 else width // groups
    else:
        kind, strides = 2, (0, 0 if scale.shape[0] == 1 else scale.stride(0))
        shared = width // scale.shape[-1]
    # A plane that does not exist is never touched: the codes stand in for it.
    given = {
        "planes": (
            codes,
            codes if scale is None else scale,
            codes if pages.zero is None else pages.zero,
        ),
        "strides": (codes.stride(0), codes.stride(1), *strides),
    }
    limit = torch.finfo(spec.scale_dtype).max if spec.scale_dtype != torch.float64 else 3.4e38
    fixed = {
        "CODE": CODE_KINDS[spec.code.name],
        "SCALES": kind,
        "ZERO": pages.zero is not None,
        "SHARED": shared,
        "LIMIT": limit,
        "BLOCK": rotation_block(width) if spec.rotation == "hadamard" else 1,
    }
    return given, fixed
