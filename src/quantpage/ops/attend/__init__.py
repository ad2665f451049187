"""Attention over quantized pages.

``attend`` reads the codes of a layer's pages directly. Queries come in the basis of the cache
(``rope_write`` hands them back so) and outputs leave in it; quantpage.attention turns them back.

Formats with exact pages are two calls over disjoint keys, body from the codes and exact from the
16-bit pages, merged by log-sum-exp: an implementation that serves a segment serves them.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops.attend.mask_candidates import MASK_CANDIDATES
from quantpage.ops.attend.merge import merge_partials
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.attend.prefill import gluon_refusals, triton_refusals
from quantpage.ops.cpu_refusals import refusals as cpu_refusals
from quantpage.ops.dispatch import Implementation, refuse_nothing
from quantpage.ops.gpu_candidates import DECODE_CANDIDATES

__all__ = ["CANDIDATES", "AttendParams", "Segment", "attend", "merge_partials"]


CANDIDATES: list[Implementation] = [
    *MASK_CANDIDATES,
    *DECODE_CANDIDATES,
    Implementation("gluon", "quantpage.ops.attend.gluon_prefill:attend", gluon_refusals),
    Implementation("triton", "quantpage.ops.attend.triton_prefill:attend", triton_refusals),
    Implementation("cpu", "quantpage.ops.attend.cpu:attend", cpu_refusals),
    Implementation("torch", "quantpage.ops.attend.torch_blockwise:attend", refuse_nothing),
]
"""In order of preference."""


def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    implementation: Implementation,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output in the query's dtype and natural log-sum-exp in at least float32.

    ``implementation`` comes from ``dispatch.choose``; it computes one segment.
    """
    run = implementation.load()
    if layer.exact_key is None:
        out, lse = run(q, layer, batch, params)
        return out.to(q.dtype), lse
    if batch.exact is None:
        raise ValueError("batch.exact: expected a plan, as the format keeps exact pages; got None")
    exact_batch = replace(
        batch, page_table=batch.exact.page_table, slots=batch.exact.slots, exact=None
    )
    # The sink is one key of the softmax: it enters once, in the merge.
    bare = replace(params, sinks=None)
    body = run(q, replace(layer, exact_key=None, exact_value=None), batch, bare, segment="body")
    near = run(q, layer.exact(), exact_batch, bare, segment="exact")
    partials = [body[0], near[0]], [body[1], near[1]]
    if implementation.name in ("triton", "gluon"):
        from quantpage.ops.attend import triton_merge

        return triton_merge.merge_partials(
            *partials, params.sinks, out=body[0].new_empty(body[0].shape, dtype=q.dtype)
        )
    out, lse = merge_partials(*partials, params.sinks)
    return out.to(q.dtype), lse
