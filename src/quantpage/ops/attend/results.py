"""How an attention kernel is called, and where it writes: the caller's memory, or new."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.checks import Needs, attends
from quantpage.ops.rows import LogSumExps, Outputs, Queries


class Results(NamedTuple):
    """Output and natural log-sum-exp of a call."""

    out: Outputs
    lse: LogSumExps | None
    """float32 and contiguous; None: nobody reads it, and kernels do not write it."""


class Asked(NamedTuple):
    """What a caller wants of a call; see ``kernel``."""

    segment: Segment = "all"
    out: Tensor | None = None
    lse: bool = True


def kernel(needs: Needs) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Put a kernel's host side (q, layer, batch, params, asked, ...) behind the entry of all."""

    def behind(by: Callable[..., Results]) -> Callable[..., Results]:
        def attend(
            q: Queries,
            layer: LayerKV,
            batch: BatchPlan,
            params: AttendParams,
            segment: Segment = "all",
            out: Outputs | None = None,
            lse_wanted: bool = True,
            **more: Any,
        ) -> Results:
            """Output and natural log-sum-exp. Segments keep float32, to be merged; 'all' is in the
            query's dtype.

            out: where a whole result goes; None: new. lse_wanted: False where nobody reads the
            log-sum-exp: it is None then. more: what this kernel takes besides.
            """
            return by(q, layer, batch, params, Asked(segment, out, lse_wanted), **more)

        attend.__module__ = by.__module__
        return attends(needs)(attend)

    return behind


def results_for(
    q: Tensor, value_dim: int, final: bool, out: Tensor | None = None, lse_wanted: bool = True
) -> Results:
    """To be written. final: False for partial results, which stay in float32 until they are merged.

    out: the caller's memory for a final result, in the query's dtype; None: new.
    """
    if out is None:
        dtype = q.dtype if final else torch.float32
        out = torch.empty(*q.shape[:2], value_dim, dtype=dtype, device=q.device)
    lse = None
    if lse_wanted:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return Results(out, lse)


def contiguous(out: Tensor | None) -> Tensor | None:
    """``out`` for kernels whose rows have no gaps between; None, for new, where it has some."""
    return out if out is not None and out.is_contiguous() else None
