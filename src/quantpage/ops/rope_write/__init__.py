"""Norm, rotate, quantize and scatter new tokens into pages."""

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops import refusals
from quantpage.ops.dispatch import Implementation, call_of, find
from quantpage.ops.rope_write.params import QKNorm, WriteParams, Written
from quantpage.ops.rows import Keys, Queries, Values

__all__ = ["CANDIDATES", "QKNorm", "WriteParams", "Written", "rope_write"]


CANDIDATES: list[Implementation] = [
    Implementation("triton", "quantpage.ops.rope_write.triton:rope_write", refusals.WRITE_TRITON),
    Implementation("cpu", "quantpage.ops.rope_write.cpu:rope_write", refusals.CPU),
    Implementation("torch", "quantpage.ops.rope_write.reference:rope_write", refusals.NOTHING),
]
"""In order of preference."""


def rope_write(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams,
    implementation: Implementation | str | None = None,
) -> Written:  # fmt: skip
    """Write a step's keys and values into their pages; the query in the basis of the cache.

    q: None where only the cache is wanted. Rows whose slot is -1 are skipped. implementation: as
    in ``ops.attend.attend``.

    Raises ValueError for what does not belong together and, in checked mode, NonFiniteInput,
    before anything is written.
    """
    if not isinstance(implementation, Implementation):
        mapped = layer.key_map
        in_turn = mapped is not None and mapped.feedback is not None
        heads = layer.kv_heads if q is None else q.shape[1]
        call = call_of(layer.facts, heads, k.dtype, "prefill", "causal", in_turn)
        implementation = find(CANDIDATES, call, implementation)
    return implementation.load()(q, k, v, layer, batch, params)
