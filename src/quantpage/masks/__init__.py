"""Who may see whom: causal, windows, sinks, intervals (docs/masks.md)."""

from quantpage.masks.base import CausalMask, FullMask, Mask
from quantpage.masks.checks import END
from quantpage.masks.columns import ColumnIntervals
from quantpage.masks.kinds import (
    block_diffusion,
    causal,
    causal_blockwise,
    causal_document,
    document,
    full,
    global_sliding_window,
    image_spans,
    prefix_lm,
    prefix_lm_document,
    qk_sparse,
    random_eviction,
    shared_question,
    sliding_window,
    tree_verification,
)
from quantpage.masks.rows import RowIntervals
from quantpage.masks.tree import TreeMask

__all__ = [
    "END",
    "CausalMask",
    "ColumnIntervals",
    "FullMask",
    "Mask",
    "RowIntervals",
    "TreeMask",
    "block_diffusion",
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "full",
    "global_sliding_window",
    "image_spans",
    "prefix_lm",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
    "shared_question",
    "sliding_window",
    "tree_verification",
]
