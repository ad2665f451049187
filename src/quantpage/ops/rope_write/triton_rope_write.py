"""The write of a step in one launch: bias, norm, rotation, Hadamard, quantize, scatter.

A program takes a few tokens and a few heads of Q, K or V; the angles of its tokens are read once
for all its heads. Everything stays in float32 registers between the projection and the code.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import rotation_block
from quantpage.ops.rope_write.params import WriteParams, Written
from quantpage.ops.rope_write.reference import refuse_non_finite
from quantpage.ops.rope_write.triton_rows import write_rows
from quantpage.ops.triton_hadamard import hadamard

CODE_KINDS = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}


@triton.jit
def _row_part(
    x, at, channel, bias, weight, real, ratio, HEAD_DIM: tl.constexpr, BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """Channels of rows, with bias, normalized by ``ratio`` and the norm's weight."""
    inside = channel < HEAD_DIM
    row = tl.load(x + at[:, None] + channel[None, :], real[:, None] & inside[None, :], 0.0)
    row = row.to(tl.float32)
    if BIAS:
        row += tl.load(bias + channel, inside, 0.0).to(tl.float32)[None, :]
    if WEIGHT:
        row = row * ratio[:, None] * tl.load(weight + channel, inside, 0.0).to(tl.float32)[None, :]
    return row


@triton.jit
def _turned(
    x, at, channel, partner, sign, cosine, sine, bias, weight, eps, real,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of Q or K in the basis of the cache. NORM: 0 none, 1 before the rotation, 2 after."""
    ones = tl.full([ROWS], 1.0, tl.float32)
    row = _row_part(x, at, channel, bias, weight, real, ones, HEAD_DIM, BIAS, False)
    ratio = ones
    inside = channel < HEAD_DIM
    if NORM == 1:
        ratio = tl.math.div_rn(ones, tl.sqrt_rn(tl.sum(row * row, 1) / HEAD_DIM + eps))
        gain = tl.load(weight + channel, inside, 0.0).to(tl.float32)
        row = row * ratio[:, None] * gain[None, :]
    if ROPE:
        # The other channel of each pair, from the cache of this multiprocessor.
        other = _row_part(x, at, partner, bias, weight, real, ratio, HEAD_DIM, BIAS, NORM == 1)
        row = row * cosine + other * sign[None, :] * sine
    if NORM == 2:
        ratio = tl.math.div_rn(ones, tl.sqrt_rn(tl.sum(row * row, 1) / HEAD_DIM + eps))
        gain = tl.load(weight + channel, inside, 0.0).to(tl.float32)
        row = row * ratio[:, None] * gain[None, :]
    if BLOCK > 1:
        row = hadamard(row, ROWS, WIDTH, BLOCK)
    return row


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
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    PAGE: tl.constexpr, EXACT: tl.constexpr, RETURN: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    wide = token.to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, heads_a_program)
    kv_parts = tl.cdiv(kv_heads, heads_a_program)
    slot = tl.load(slots + token, real, -1)
    near = slot
    if EXACT:
        near = tl.load(exact_slots + token, real, -1)
    if part < q_parts + kv_parts:
        channel = tl.arange(0, WIDTH)
        HALF: tl.constexpr = ROTARY // 2
        if INTERLEAVED:
            partner = channel ^ 1
            angle = channel // 2
            sign = tl.where(channel % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
            angle = tl.where(channel < HALF, channel, channel - HALF)
            sign = tl.where(channel < HALF, -1.0, 1.0)
        cosine = tl.full([ROWS, WIDTH], 1.0, tl.float32)
        sine = tl.zeros([ROWS, WIDTH], tl.float32)
        if ROTARY > 0:
            turns = channel < ROTARY
            partner = tl.where(turns, partner, channel)
            where = tl.load(positions + token, real, 0).to(tl.int64) * angle_row
            mask = real[:, None] & turns[None, :]
            cosine = tl.load(cos + where[:, None] + angle[None, :], mask, 1.0).to(tl.float32)
            sine = tl.load(sin + where[:, None] + angle[None, :], mask, 0.0).to(tl.float32)
        if part < q_parts:
            first = part * heads_a_program
            for head in tl.range(
                first, tl.minimum(first + heads_a_program, q_heads), num_stages=STAGES
            ):
                row = _turned(
                    q, wide * q_token + head * q_head, channel, partner, sign, cosine, sine,
                    q_bias + head * HEAD_DIM, q_weight, eps, real,
                    HEAD_DIM, WIDTH, ROWS, BIAS, NORM, ROTARY > 0, K_BLOCK,
                )  # fmt: skip
                to = q_out + (wide * q_heads + head) * HEAD_DIM
                mask = real[:, None] & (channel < HEAD_DIM)[None, :]
                tl.store(to[:, None] + channel[None, :], row.to(q_out.dtype.element_ty), mask)
        else:
            first = (part - q_parts) * heads_a_program
            for head in tl.range(
                first, tl.minimum(first + heads_a_program, kv_heads), num_stages=STAGES
            ):
                row = _turned(
                    k, wide * k_token + head * k_head, channel, partner, sign, cosine, sine,
                    k_bias + head * HEAD_DIM, k_weight, eps, real,
                    HEAD_DIM, WIDTH, ROWS, BIAS, NORM, ROTARY > 0, K_BLOCK,
                )  # fmt: skip
                to = k_seen + (wide * kv_heads + head) * HEAD_DIM
                write_rows(
                    row, real, slot, head, channel, k_codes, k_scale, k_zero, k_page, k_page_head,
                    k_scale_page, k_scale_head, to, K_CODE, K_SCALES, K_ZERO, K_SHARED,
                    HEAD_DIM, WIDTH, PAGE, ROWS, K_LIMIT, RETURN,
                )  # fmt: skip
                if EXACT:
                    write_rows(
                        row, real, near, head, channel, k_exact, k_scale, k_zero, k_exact_page,
                        k_exact_head, 0, 0, to, 0, 0, False, 1,
                        HEAD_DIM, WIDTH, PAGE, ROWS, K_LIMIT, False,
                    )  # fmt: skip
    else:
        channel = tl.arange(0, V_WIDTH)
        first = (part - q_parts - kv_parts) * heads_a_program
        ones = tl.full([ROWS], 1.0, tl.float32)
        for head in tl.range(
            first, tl.minimum(first + heads_a_program, kv_heads), num_stages=STAGES
        ):
            row = _row_part(
                v, wide * v_token + head * v_head, channel, v_bias + head * VALUE_DIM, v_bias,
                real, ones, VALUE_DIM, BIAS, False,
            )  # fmt: skip
            if V_BLOCK > 1:
                row = hadamard(row, ROWS, V_WIDTH, V_BLOCK)
            to = v_seen + (wide * kv_heads + head) * VALUE_DIM
            write_rows(
                row, real, slot, head, channel, v_codes, v_scale, v_zero, v_page, v_page_head,
                v_scale_page, v_scale_head, to, V_CODE, V_SCALES, V_ZERO, V_SHARED,
                VALUE_DIM, V_WIDTH, PAGE, ROWS, V_LIMIT, RETURN,
            )  # fmt: skip
            if EXACT:
                write_rows(
                    row, real, near, head, channel, v_exact, v_scale, v_zero, v_exact_page,
                    v_exact_head, 0, 0, to, 0, 0, False, 1,
                    VALUE_DIM, V_WIDTH, PAGE, ROWS, V_LIMIT, False,
                )  # fmt: skip


def launch_shape(tokens: int) -> tuple[int, int, int]:
    """Tokens and heads a program, and heads read ahead: few while that alone fills the device."""
    if tokens <= 64:
        return 4, 1, 1
    if tokens <= 1024:
        return 8, 2, 1
    return 8, 8, 1


def rope_write(
    q: Float[Tensor, "tokens q_heads head_dim"] | None,
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads value_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: WriteParams,
    shape: tuple[int, int, int] | None = None,
) -> Written:
    """As ops/rope_write/reference.rope_write, in one launch; strides of tokens and heads are free.

    shape: tokens, heads and heads read ahead a program; None: ``launch_shape``.
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
    rows, heads, stages = shape or launch_shape(tokens)
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
        WIDTH=triton.next_power_of_2(width),
        VALUE_DIM=value_width,
        V_WIDTH=triton.next_power_of_2(value_width),
        ROTARY=0 if rope is None else rope.rotary_dim,
        INTERLEAVED=rope is not None and rope.interleaved,
        NORM=0 if norm is None else (2 if norm.after_rope else 1),
        BIAS=params.bias is not None,
        PAGE=batch.page_size,
        EXACT=exact is not None,
        RETURN=params.return_rows,
        ROWS=rows,
        STAGES=stages,
        num_warps=4,
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
