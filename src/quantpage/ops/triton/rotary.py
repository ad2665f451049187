"""Rotary embedding of a step's queries and keys on a GPU in one launch, as models compute it.

Every product and sum is rounded to the model's dtype, in which cos and sin are given: the result is
Transformers' to the bit. (The write op's own rotation is in float32, ``quantpage.rope``.)
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_HEADS = 8
"""That one program turns."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Of a launch: a product that is fused with a sum would not be rounded."""


@triton.jit
def _turn(
    x, out, cos, sin, row, new, heads, at, head, row_stride, head_stride, new_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) of some heads of a token."""
    kind = x.dtype.element_ty
    channel = tl.arange(0, BLOCK)
    inside = channel < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    # Strides count blocks of 16 bytes, so that the compiler knows that rows begin at one.
    start = (row * row_stride + at * new_stride + head.to(tl.int64) * head_stride) * 8
    first = x + start[:, None] + channel[None, :]
    a = tl.load(first, mask, 0.0).to(tl.float32)
    b = tl.load(first + HALF, mask, 0.0).to(tl.float32)
    cos_a = tl.load(cos + channel, inside, 0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + HALF + channel, inside, 0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + channel, inside, 0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + HALF + channel, inside, 0.0).to(tl.float32)[None, :]
    # Products of two 16-bit numbers are exact in float32, so that each is rounded once. The
    # compiler makes them products of 16 bits, and must not fuse these with the sums (OPTIONS).
    left = (a * cos_a).to(kind).to(tl.float32) - (b * sin_a).to(kind).to(tl.float32)
    right = (b * cos_b).to(kind).to(tl.float32) + (a * sin_b).to(kind).to(tl.float32)
    to = out + ((row * new + at) * heads + head.to(tl.int64))[:, None] * (2 * HALF)
    to += channel[None, :]
    tl.store(to, left.to(kind), mask)
    tl.store(to + HALF, right.to(kind), mask)


_STRIDES = [
    "new", "q_heads", "k_heads", "q_row", "q_head", "q_new", "k_row", "k_head", "k_new",
    "cos_row", "cos_new", "sin_row", "sin_new",
]  # fmt: skip


@triton.jit(do_not_specialize=_STRIDES)
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, new, q_heads, k_heads, q_row, q_head, q_new, k_row, k_head, k_new,
    cos_row, cos_new, sin_row, sin_new,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A token and some of its query or key heads."""
    token = tl.program_id(0).to(tl.int64)
    row, at = token // new, token % new
    cos += row * cos_row + at * cos_new
    sin += row * sin_row + at * sin_new
    part = tl.program_id(1)
    parts = tl.cdiv(q_heads, HEADS)
    head = tl.arange(0, HEADS)
    if part < parts:
        head += part * HEADS
        _turn(q, q_out, cos, sin, row, new, q_heads, at, head, q_row, q_head, q_new, HALF, BLOCK)
    else:
        head += (part - parts) * HEADS
        _turn(k, k_out, cos, sin, row, new, k_heads, at, head, k_row, k_head, k_new, HALF, BLOCK)


Heads = Float[Tensor, "rows heads new head_dim"]


def serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``turn_heads`` takes them: 16 bits, on one GPU, heads side by side."""
    each = (q, k, cos, sin)
    return (
        q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
        and q.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == q.dtype and x.device == q.device and x.stride(-1) == 1 for x in each)
        and q.shape[-1] % 2 == 0
        and q.shape[0] == k.shape[0]
        and q.shape[2] == k.shape[2]
        and k.shape[-1] == q.shape[-1]
        and all(x.shape[1:] == (q.shape[2], q.shape[3]) for x in (cos, sin))
        and all(x.shape[0] in (1, q.shape[0]) for x in (cos, sin))
        and all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3]) for x in (q, k))
    )


def turn_heads(
    q: Heads,
    k: Heads,
    cos: Float[Tensor, "rows_or_1 new head_dim"],
    sin: Float[Tensor, "rows_or_1 new head_dim"],
) -> tuple[Heads, Heads]:
    """Llama's ``apply_rotary_pos_emb``, of what ``serves``: half-split pairs, all channels."""
    rows, q_heads, new, dim = q.shape
    k_heads = k.shape[1]
    out = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
           for x in (q, k)]  # fmt: skip
    if q.numel() or k.numel():
        by_row = [(0 if x.shape[0] == 1 else x.stride(0), x.stride(1)) for x in (cos, sin)]
        parts = triton.cdiv(q_heads, _HEADS) + triton.cdiv(k_heads, _HEADS)
        rotary_kernel[(rows * new, parts)](
            q, k, cos, sin, *out, new, q_heads, k_heads,
            *(each // 8 for x in (q, k) for each in x.stride()[:3]),
            *by_row[0], *by_row[1],
            HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), HEADS=_HEADS,
            **OPTIONS,
        )  # fmt: skip
    return out[0].transpose(1, 2), out[1].transpose(1, 2)
