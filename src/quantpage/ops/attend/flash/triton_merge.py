"""Joining partial results on the GPU; see attend/merge for the rule and its empty rows."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.ops.triton.common import LN2, LOG2E


@triton.jit(do_not_specialize=["rows", "heads"])
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
    one = tl.load(a_lse + row, real, float("-inf"))
    two = tl.load(b_lse + row, real, float("-inf"))
    top = tl.maximum(one, two)
    if SINKS:
        sink = tl.load(sinks + row % heads, real, 0.0).to(tl.float32)
        top = tl.maximum(top, sink)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    # The difference first: large logarithms would lose it to a change of base.
    weight_one = tl.exp2((one - anchor) * LOG2E)
    weight_two = tl.exp2((two - anchor) * LOG2E)
    total = weight_one + weight_two
    if SINKS:
        total += tl.exp2((sink - anchor) * LOG2E)
    safe = tl.where(total != 0, total, 1.0)
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    inside = (channel < VALUE_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * VALUE_DIM + channel[None, :]
    has_one = (real & (one != float("-inf")))[:, None] & inside
    has_two = (real & (two != float("-inf")))[:, None] & inside
    first = tl.load(a + at, has_one, 0.0).to(tl.float32) * (weight_one / safe)[:, None]
    second = tl.load(b + at, has_two, 0.0).to(tl.float32) * (weight_two / safe)[:, None]
    tl.store(out + at, (first + second).to(out.dtype.element_ty), real[:, None] & inside)
    row_lse = tl.where(total != 0, anchor + tl.log2(safe) * LN2, float("-inf"))
    tl.store(lse + row, row_lse, real)


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
