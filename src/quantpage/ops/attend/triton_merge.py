"""Joining partial results on the GPU; see attend/merge for the rule and its empty rows."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_cuts_kernel(
    cuts,
    part_out,
    part_lse,
    query_starts,
    context_lens,
    sinks,
    out,
    lse,
    kv_heads,
    out_token,
    out_head,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The row that begins in decode program c and was cut: one query row of it a program."""
    c = tl.program_id(0)
    row = tl.program_id(1)
    cut = cuts + c * 4
    request = tl.load(cut)
    if request >= 0:
        item = tl.load(cut + 1)
        slot = tl.load(cut + 2)
        parts = tl.load(cut + 3) - c + 1
        q_start = tl.load(query_starts + request)
        q_len = tl.load(query_starts + request + 1) - q_start
        q_len = tl.minimum(q_len, tl.load(context_lens + request))
        row_at = (item % ROW_TILES) * ROWS + row
        token = row_at // GROUP
        if token < q_len:
            head = (item // ROW_TILES) * GROUP + row_at % GROUP
            channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
            inside = channel < VALUE_DIM
            top = float("-inf")
            total = 0.0
            acc = tl.zeros([triton.next_power_of_2(VALUE_DIM)], tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)
                real = part < parts
                # Later programs hold their piece of this row in their first slot.
                at = (tl.where(part == 0, slot, 2 * (c + part)) * ROWS + row).to(tl.int64)
                own = tl.load(part_lse + at, real, float("-inf"))
                new_top = tl.maximum(top, tl.max(own, 0))
                anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
                weight = tl.exp2(own - anchor)
                shrink = tl.exp2(top - anchor)
                # Select: a piece that saw nothing was not promised to be finite.
                mask = (real & (own != float("-inf")))[:, None] & inside[None, :]
                piece = tl.load(part_out + at[:, None] * VALUE_DIM + channel[None, :], mask, 0.0)
                acc = acc * shrink + tl.sum(piece * weight[:, None], 0)
                total = total * shrink + tl.sum(weight, 0)
                top = new_top
            if SINKS:
                sink = tl.load(sinks + head).to(tl.float32) * LOG2E
                new_top = tl.maximum(top, sink)
                shrink = tl.exp2(top - new_top)
                acc = acc * shrink
                total = total * shrink + tl.exp2(sink - new_top)
                top = new_top
            safe = tl.where(total != 0, total, 1.0)
            row_lse = tl.where(total != 0, top + tl.log2(safe), float("-inf"))
            token_at = (q_start + token).to(tl.int64)
            to = out + token_at * out_token + head.to(tl.int64) * out_head + channel
            tl.store(to, (acc / safe).to(out.dtype.element_ty), inside)
            tl.store(lse + token_at * (kv_heads * GROUP) + head, row_lse * LN2)


@triton.jit
def _merge_two_kernel(
    a,
    b,
    a_lse,
    b_lse,
    sinks,
    out,
    lse,
    rows,
    heads,
    VALUE_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = row < rows
    one = tl.load(a_lse + row, real, float("-inf")) * LOG2E
    two = tl.load(b_lse + row, real, float("-inf")) * LOG2E
    top = tl.maximum(one, two)
    if SINKS:
        sink = tl.load(sinks + row % heads, real, 0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    weight_one = tl.exp2(one - anchor)
    weight_two = tl.exp2(two - anchor)
    total = weight_one + weight_two
    if SINKS:
        total += tl.exp2(sink - anchor)
    safe = tl.where(total != 0, total, 1.0)
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    inside = (channel < VALUE_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * VALUE_DIM + channel[None, :]
    has_one = (real & (one != float("-inf")))[:, None] & inside
    has_two = (real & (two != float("-inf")))[:, None] & inside
    first = tl.load(a + at, has_one, 0.0).to(tl.float32) * (weight_one / safe)[:, None]
    second = tl.load(b + at, has_two, 0.0).to(tl.float32) * (weight_two / safe)[:, None]
    tl.store(out + at, (first + second).to(out.dtype.element_ty), real[:, None] & inside)
    row_lse = tl.where(total != 0, anchor + tl.log2(safe), float("-inf"))
    tl.store(lse + row, row_lse * LN2, real)


def merge_partials(
    outs: list[Float[Tensor, "tokens q_heads value_dim"]],
    lses: list[Float[Tensor, "tokens q_heads"]],
    sinks: Float[Tensor, " q_heads"] | None = None,
    out: Float[Tensor, "tokens q_heads value_dim"] | None = None,
    lse: Float[Tensor, "tokens q_heads"] | None = None,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """As attend/merge.merge_partials; contiguous partials, one launch for each after the first.

    out, lse: where the result goes, the first partial's own tensors included; None: new float32.
    """
    assert len(outs) == len(lses) >= 2
    out = torch.empty_like(outs[0], dtype=torch.float32) if out is None else out
    lse = torch.empty_like(lses[0], dtype=torch.float32) if lse is None else lse
    so_far, so_far_lse = outs[0], lses[0]
    heads, width = outs[0].shape[1:]
    rows = outs[0].shape[0] * heads
    for at in range(1, len(outs)):
        last = at == len(outs) - 1
        _merge_two_kernel[(triton.cdiv(rows, 8),)](
            so_far.contiguous(),
            outs[at].contiguous(),
            so_far_lse.contiguous(),
            lses[at].contiguous(),
            sinks if last else None,
            out,
            lse,
            rows,
            heads,
            VALUE_DIM=width,
            SINKS=last and sinks is not None,
            TILE=8,
            num_warps=4,
        )
        so_far, so_far_lse = out, lse
    return out, lse
