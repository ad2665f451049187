"""Any mask as the key ranges of each query row, which is what the compiled core reads.

The layers of a step share one answer. Whether it is theirs is decided by what the mask says, not by
which object says it: a buffer that is filled anew is another mask, however it was written to
(torch counts no writes to inference tensors, nor those through numpy). Comparing costs a read
of the mask's integers, a thousandth of the keys that they speak of.
"""

from collections.abc import Hashable

import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.masks import ColumnIntervals, Mask, RowIntervals

QUERY_TILE = 128

Intervals = tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " ranges"], Int[Tensor, " ranges"]]
_last: tuple[Hashable, Tensor, Tensor, Intervals] | None = None


def intervals_of(mask: Mask, batch: BatchPlan, kv_heads: int) -> Intervals:
    """(starts, low, high): row r sees keys [low[i], high[i]), i from starts[r] to starts[r + 1].

    Rows are the step's tokens, for each kv_head in turn where the mask differs by head. The
    answer is kept for the other layers of the step.
    """
    global _last
    heads = kv_heads if mask.per_head else 1
    form = mask.form
    facts: tuple[object, ...]
    if isinstance(form, ColumnIntervals):
        said, facts = form.bounds, ("columns", form.causal, form.lengths)
    elif isinstance(form, RowIntervals):
        said, facts = form.intervals, ("rows", form.first, form.lengths)
    else:
        # A mask that is told in another way is asked at every layer.
        return _find(mask, batch, heads)
    asked = (*facts, heads, batch.query_lens, batch.host_context_lens)
    kept = _last
    if (
        kept is not None
        and kept[0] == asked
        and torch.equal(kept[1], said)
        and torch.equal(kept[2], batch.positions)
    ):
        return kept[3]
    found = _find(mask, batch, heads)
    _last = (asked, said.clone(), batch.positions.clone(), found)
    return found


def _find(mask: Mask, batch: BatchPlan, heads: int) -> Intervals:
    counts, lows, highs = [], [], []
    for head in range(heads):
        row = 0
        for request, new in enumerate(batch.query_lens):
            keys = torch.arange(batch.host_context_lens[request], device="cpu")
            for first in range(row, row + new, QUERY_TILE):
                queries = batch.positions[first : min(first + QUERY_TILE, row + new)]
                seen = mask.visible(queries, keys, request, head)
                edges = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff(dim=1)
                begins = (edges == 1).nonzero()
                counts.append((edges == 1).sum(1))
                lows.append(begins[:, 1])
                highs.append((edges == -1).nonzero()[:, 1])
            row += new
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    starts = torch.nn.functional.pad(torch.cat([none, *counts]).cumsum(0), (1, 0))
    low, high = (torch.cat([none, *each]).to(torch.int32) for each in (lows, highs))
    return starts, low, high
