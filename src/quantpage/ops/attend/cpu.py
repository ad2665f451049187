"""Attention over quantized pages in the compiled core: prefill, decode and everything between.

The core (csrc/attend*) reads the codes where they lie. Rows that share keys (the group, and up
to 64 rows of a prompt) are served together, so that a key is converted once; integer codes are
multiplied as 16-bit words; what a row may not see is not read.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.cpu_core import core
from quantpage.cpu_core.records import ATTEND, CODES, float32_statics, pages_fields
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend.cpu_intervals import intervals_of
from quantpage.ops.attend.params import SEGMENTS, AttendParams, Segment


def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
    isa: int | None = None,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output (the query's dtype; float32 for a segment) and natural log-sum-exp in float32.

    isa: an index of cpu_core.ISAS that the machine runs; None: the widest.
    """
    library = core()
    if q.stride(2) != 1:
        q = q.contiguous()
    tokens, q_heads, _ = q.shape
    key, value = float32_statics(layer.key), float32_statics(layer.value)
    out_dtype = q.dtype if segment == "all" else torch.float32
    out = torch.empty(tokens, q_heads, value.head_dim, dtype=out_dtype)
    lse = torch.empty(tokens, q_heads)
    mask = params.mask
    intervals: tuple[Tensor, ...] = ()
    kind, window, sink_tokens = 0, 0, 0
    if isinstance(mask, CausalMask):
        window, sink_tokens = mask.window or 0, mask.sink_tokens
    elif isinstance(mask, FullMask):
        kind = 1
    else:
        kind, intervals = 2, intervals_of(mask, batch, layer.kv_heads)
    sinks = params.sinks
    if sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
        sinks = sinks.float().contiguous()
    page_table = batch.page_table
    q_strides = q.stride()
    record = ATTEND.pack(
        *pages_fields(key),
        *pages_fields(value),
        q.data_ptr(),
        CODES[q.dtype],
        q_strides[0],
        q_strides[1],
        out.data_ptr(),
        CODES[out_dtype],
        lse.data_ptr(),
        page_table.data_ptr(),
        page_table.stride(0),
        batch.query_starts.data_ptr(),
        batch.context_lens.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        *((each.data_ptr() for each in intervals) if intervals else (0, 0, 0)),
        int(mask.per_head),
        len(batch.query_lens),
        tokens,
        q_heads,
        layer.kv_heads,
        batch.page_size,
        kind,
        window,
        sink_tokens,
        SEGMENTS[segment],
        torch.get_num_threads(),
        library.isa if isa is None else isa,
        params.softmax_scale,
        params.softcap or 0.0,
    )
    if library.attend(record):
        raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
    return out, lse
