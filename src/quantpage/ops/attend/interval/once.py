"""What the layers of one step share: the planner's answer, made by the first layer that asks.

A plan is a step's when mask, lengths and shape are: the same objects, and none of their tensors
written to since (torch counts writes). Where that cannot be told it is made anew: inference tensors
have no such count, and in a captured graph lengths move from replay to replay.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.kept import KeptWith
from quantpage.masks import ColumnIntervals, RowIntervals

Made = TypeVar("Made")
_MOST = 8
"""Answers kept of one step: masks times kernels times segments of a model's layers."""
_answers: KeptWith[Tensor, dict[Hashable, tuple[object, object]]] = KeptWith(lambda _: {})
"""Of a step's context_lens: what was asked -> (the mask, the answer)."""


def once_a_step(
    mask: ColumnIntervals | RowIntervals,
    batch: BatchPlan,
    asked: Hashable,
    make: Callable[[], Made],
) -> Made:
    """``make()``, or what it gave for the same lengths, mask and ``asked`` on this stream."""
    lengths = batch.context_lens
    bounds = mask.bounds if isinstance(mask, ColumnIntervals) else mask.intervals
    told = (batch.query_starts, bounds)
    if any(each.is_inference() for each in (lengths, *told)) or _capturing(lengths):
        return make()
    stream = torch.cuda.current_stream(lengths.device).cuda_stream if lengths.is_cuda else 0
    versions = tuple((id(each), each._version) for each in (lengths, *told))
    host = (batch.query_lens, batch.host_context_lens, batch.page_size)
    key = (id(mask), versions, host, stream, asked)
    steps = _answers(lengths)
    if key not in steps:
        if len(steps) == _MOST:
            steps.pop(next(iter(steps)))
        # What is told apart by its address is kept, so that nothing else comes to lie there.
        steps[key] = ((mask, told), make())
    return steps[key][1]  # type: ignore[return-value]


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
