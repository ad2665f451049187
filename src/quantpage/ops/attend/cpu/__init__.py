"""Attention over quantized pages in the compiled core: prefill, decode and everything between.

The core (csrc/attend*) reads the codes where they lie. Rows that share keys (the group, and up
to 64 rows of a prompt) are served together, so that a key is converted once; integer codes are
multiplied as 16-bit words; what a row may not see is not read. Latent rows are read as keys and as
values, their rotary channels as floats.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.cpu_core import core
from quantpage.cpu_core.interface import ATTEND, number
from quantpage.cpu_core.records import CODES, layer_record, step_record
from quantpage.masks import CausalMask, FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.cpu.intervals import intervals_of
from quantpage.ops.attend.params import AttendParams
from quantpage.ops.checks import Needs, attends


@attends(Needs(refusals.CPU, kind="cpu", host_lengths=True))
def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    model_basis: bool = False,
    isa: int | None = None,
    out: Float[Tensor, "tokens q_heads value_dim"] | None = None,
    lse_wanted: bool = True,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"] | None]:
    """Output in the query's dtype and natural log-sum-exp in float32.

    Exact pages take part where the layer has some. model_basis: turn the output back where values
    are cached rotated. isa: an index of cpu_core.ISAS that the machine runs; None: the widest.
    out: where the output goes, if it is contiguous. lse_wanted: False for no log-sum-exp.
    """
    library = core()
    if q.stride(2) != 1:
        q = q.contiguous()
    tokens, q_heads, _ = q.shape
    by_token, by_head, _ = q.stride()
    dtype = CODES[q.dtype]
    if out is None or not out.is_contiguous():
        out = q.new_empty(tokens, q_heads, layer.facts.out_dim)
    lse = torch.empty(tokens, q_heads, device="cpu") if lse_wanted else None
    mask, sinks = params.mask, params.sinks
    kind, window, sink_tokens, intervals = "CAUSAL", 0, 0, (0, 0, 0)
    if isinstance(mask, CausalMask):
        window, sink_tokens = mask.window or 0, mask.sink_tokens
    elif isinstance(mask, FullMask):
        kind = "FULL"
    else:
        kind, found = "INTERVALS", intervals_of(mask, batch, layer.kv_heads)
        starts, low, high = (each.data_ptr() for each in found)
        intervals = starts, low, high
    if sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
        sinks = sinks.float().contiguous()
    call = ATTEND.pack(
        q=q.data_ptr(),
        q_type=dtype,
        q_token=by_token,
        q_head=by_head,
        out=out.data_ptr(),
        out_type=dtype,
        lse=0 if lse is None else lse.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        starts=intervals[0],
        low=intervals[1],
        high=intervals[2],
        per_head=mask.per_head,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=layer.kv_heads,
        latent=layer.latent,
        mask=number(kind),
        window=window,
        sink_tokens=sink_tokens,
        model_basis=model_basis,
        threads=torch.get_num_threads(),
        isa=library.isa if isa is None else isa,
        softmax_scale=params.softmax_scale,
        softcap=params.softcap or 0.0,
    )
    if library.attend(layer_record(layer) + step_record(batch) + call):
        raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
    return out, lse
