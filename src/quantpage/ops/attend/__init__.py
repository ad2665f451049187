"""Attention over quantized pages.

``attend`` reads the codes of a layer's pages directly. Queries come in the basis of the cache
(``rope_write`` hands them back so) and outputs leave in it, or in the model's where that is asked.

Formats with exact pages are two calls over disjoint keys, body from the codes and exact from the
16-bit pages, merged by log-sum-exp: an implementation that serves a segment serves them. A whole
implementation does all of it in one call.
"""

from dataclasses import replace
from importlib import import_module
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops import refusals
from quantpage.ops.attend.merge import merge_partials
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.checks import check_attend, needs_of, unchecked
from quantpage.ops.dispatch import Implementation
from quantpage.ops.rotate_output import rotate_output

__all__ = ["CANDIDATES", "AttendParams", "Segment", "attend", "merge_partials"]


_ROOMS = {
    "triton_decode": "decode.triton",
    "triton_prefill": "prefill.triton",
    "gluon_prefill": "prefill.gluon",
    "triton_flash_mask": "interval.triton",
    "gluon_flash_mask": "interval.gluon",
}
"""Kernels by the names that they had before they moved into rooms, for scripts written then."""


def __getattr__(name: str) -> ModuleType:
    """A kernel's host module, imported when it is asked for: it imports triton."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{_ROOMS[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MERGE = "quantpage.ops.attend.triton_merge:merge_partials"
CANDIDATES: list[Implementation] = [
    Implementation(
        "gluon", "quantpage.ops.attend.interval.gluon:attend", refusals.INTERVAL_GLUON, merge=_MERGE
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.interval.triton:attend",
        refusals.INTERVAL_TRITON,
        merge=_MERGE,
    ),
    Implementation(
        "gluon", "quantpage.ops.attend.decode.gluon:attend", refusals.DECODE_GLUON, joins=True
    ),
    Implementation(
        "triton", "quantpage.ops.attend.decode.triton:attend", refusals.DECODE_TRITON, joins=True
    ),
    Implementation(
        "gluon", "quantpage.ops.attend.prefill.gluon:attend", refusals.PREFILL_GLUON, merge=_MERGE
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.prefill.triton:attend",
        refusals.PREFILL_TRITON,
        merge=_MERGE,
    ),
    Implementation("cpu", "quantpage.ops.attend.cpu:attend", refusals.CPU, whole=True),
    Implementation("torch", "quantpage.ops.attend.torch_blockwise:attend", refusals.NOTHING),
]
"""In order of preference."""


def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    implementation: Implementation,
    model_basis: bool = False,
    lse_wanted: bool = True,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output in the query's dtype and natural log-sum-exp in at least float32.

    ``implementation`` comes from ``dispatch.choose``. model_basis: turn the output back where
    values are cached rotated. lse_wanted: False where nobody reads the log-sum-exp, which may then
    be that of scores without the keys' mean (``KeyMap``).
    """
    mapped = layer.key_map
    if mapped is None or mapped.mean is None:
        return _attend(q, layer, batch, params, implementation, model_basis)
    if params.softcap is not None:
        raise ValueError(
            "key_map: expected one without a mean, as a capped score is no sum of its parts; got "
            f"one with a mean under softcap {params.softcap}"
        )
    if not lse_wanted and params.sinks is None:
        return _attend(q, layer, batch, params, implementation, model_basis)
    bare = replace(params, sinks=None)
    out, lse = _attend(q, layer, batch, bare, implementation, model_basis)
    missing = mapped.left_out(q, layer.key.spec.rotation == "hadamard")
    assert missing is not None
    lse = lse + missing * params.softmax_scale
    if params.sinks is not None:
        # Only now, as a sink's logit is compared with whole scores.
        return merge_partials([out], [lse], params.sinks, out=torch.empty_like(out))
    return out, lse


def _attend(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    implementation: Implementation,
    model_basis: bool,
) -> tuple[Tensor, Tensor]:
    """``attend`` by scores of the keys as they are cached."""
    run = implementation.load()
    if implementation.whole:
        return run(q, layer, batch, params, model_basis)
    if layer.exact_key is None:
        out, lse = run(q, layer, batch, params)
    else:
        out, lse = _attend_segments(q, layer, batch, params, implementation)
    if model_basis and layer.value.spec.rotation == "hadamard":
        out = rotate_output(out)
    return out.to(q.dtype), lse


def _attend_segments(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, by: Implementation
) -> tuple[Tensor, Tensor]:
    """Body and exact pages, each by a call, and their merge unless the second call does it."""
    run = by.load()
    check_attend(q, layer, batch, params, needs_of(run))
    run, exact_batch = unchecked(run), batch.exact_step()
    # The sink is one key of the softmax: it enters once, in the merge.
    bare = replace(params, sinks=None)
    body = run(q, layer.body(), batch, bare, segment="body")
    if by.joins:
        return run(q, layer.exact(), exact_batch, params, segment="exact", earlier=body)
    near = run(q, layer.exact(), exact_batch, bare, segment="exact")
    out = body[0].new_empty(body[0].shape, dtype=q.dtype)
    return by.load_merge()([body[0], near[0]], [body[1], near[1]], params.sinks, out=out)
