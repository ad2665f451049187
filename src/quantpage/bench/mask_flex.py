"""FlexAttention on the same masks: block masks from our planner, the kind's columns as mask_mod."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from quantpage.bench.mask_kinds import Made
from quantpage.masks import END, ColumnIntervals
from quantpage.ops.attend.interval import triton_plan as triton_mask_plan
from quantpage.ops.attend.interval.plan import MaskTile

BLOCK = 128


def form_of(mask: ColumnIntervals) -> str:
    """Which mask_mod serves it, the cheapest; kinds of one form share a compiled kernel."""
    first, last = mask.bounds[0, 0, 0], mask.bounds[0, 0, -1]
    if mask.bounds.shape[2] <= 2 and bool((first == END).all()):
        if mask.causal and mask.bounds.shape[2] == 1:
            return "causal"
        if not mask.causal and not last.any():
            return "full"
    return ("causal" if mask.causal else "both") + str(mask.bounds.shape[2])


def runner(mask: ColumnIntervals, made: Made, n: int) -> Callable[[], Tensor]:
    """A call of FlexAttention in bfloat16 on ``n`` tokens of dense keys and values.

    The result is [1, q_heads, n, head_dim].
    """
    q = made.q.transpose(0, 1)[None].contiguous()
    run = _compiled()
    block = None if form_of(mask) == "full" else _block_mask(mask, made, n)
    return lambda: run(q, made.k[None], made.v[None], block_mask=block, enable_gqa=True)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Every form and length is a recompilation to Dynamo.
    config: Any = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(mask: ColumnIntervals, made: Made, n: int) -> BlockMask:
    plan = triton_mask_plan.plan_tiles(mask.to("cuda"), made.batch, 1, MaskTile(BLOCK, BLOCK))
    full, partial = plan.counts[None, None, :, 0, 0], plan.counts[None, None, :, 0, 1]
    lists = plan.tiles[:, 0].clamp(0, plan.tiles.shape[-1] - 1)
    return BlockMask.from_kv_blocks(
        partial.contiguous(),
        lists.flip(-1)[None, None].contiguous(),
        full.contiguous(),
        lists[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(mask),
        seq_lengths=(n, n),
    )


def _mask_mod(mask: ColumnIntervals) -> Callable:
    """masks/columns as FlexAttention wants it; bounds that every kind has are its own tensors."""
    rows = [each.clone() for each in mask.bounds[0, 0].cuda()]
    lts, last = rows[0], rows[-1]
    if form_of(mask) == "causal":
        return lambda b, h, i, j: i >= j
    if form_of(mask) == "causal1":
        return lambda b, h, i, j: (i >= j) & (i < lts[j])
    if form_of(mask) == "causal2":
        return lambda b, h, i, j: (i >= j) & ((i < lts[j]) | (i >= last[j]))
    if form_of(mask) == "both2":
        return lambda b, h, i, j: (i < lts[j]) & (i >= last[j])
    lte, uts = rows[1], rows[2]
    return lambda b, h, i, j: ((i < lts[j]) | (i >= lte[j])) & ((i < uts[j]) | (i >= last[j]))
