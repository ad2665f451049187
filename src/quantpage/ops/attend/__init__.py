"""Attention over quantized pages.

``attend`` reads the codes of a layer's pages directly. Queries come in the basis of the cache
(``rope_write`` hands them back so) and outputs leave in it, or in the model's where that is asked.

Formats with exact pages are two calls over disjoint keys, body from the codes and exact from the
16-bit pages, merged by log-sum-exp: an implementation that serves a segment serves them. One that
joins does it in one call, a whole one turns outputs back besides.

Of a layer of latent rows (``LayerKV.latent``) a key is the row and the rotary channels after it,
and the value the row alone: queries come absorbed, [W_k^T q, q_rope], and outputs leave as sums of
rows, for W_v.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops import refusals
from quantpage.ops.attend.merge import merge_partials
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.attend.results import contiguous
from quantpage.ops.checks import check_attend, check_out, needs_of, unchecked
from quantpage.ops.dispatch import Implementation, call_of, find, phase_of
from quantpage.ops.rotate_output import rotate_output
from quantpage.ops.rows import LogSumExps, Outputs, Queries

__all__ = ["CANDIDATES", "AttendParams", "Segment", "attend", "merge_partials"]

_RESERVE = "quantpage.ops.attend.decode.reserve:reserve"
_RESERVE_LATENT = "quantpage.ops.attend.latent.reserve:reserve"
_MERGE = "quantpage.ops.attend.flash.triton_merge:merge_partials"
CANDIDATES: list[Implementation] = [
    Implementation(
        "gluon",
        "quantpage.ops.attend.interval.gluon:attend",
        refusals.INTERVAL_GLUON,
        into=True,
        merge=_MERGE,
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.interval.triton:attend",
        refusals.INTERVAL_TRITON,
        into=True,
        merge=_MERGE,
    ),
    Implementation(
        "gluon",
        "quantpage.ops.attend.decode.gluon:attend",
        refusals.DECODE_GLUON,
        into=True,
        reserve=_RESERVE,
        joins=True,
        turns=True,
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.decode.triton:attend",
        refusals.DECODE_TRITON,
        into=True,
        reserve=_RESERVE,
        joins=True,
        turns=True,
    ),
    Implementation(
        "gluon",
        "quantpage.ops.attend.prefill.gluon:attend",
        refusals.PREFILL_GLUON,
        into=True,
        reserve=_RESERVE,
        joins=True,
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.prefill.triton:attend",
        refusals.PREFILL_TRITON,
        into=True,
        reserve=_RESERVE,
        merge=_MERGE,
    ),
    Implementation(
        "gluon",
        "quantpage.ops.attend.latent.gluon:attend",
        refusals.LATENT_GLUON,
        into=True,
        reserve=_RESERVE_LATENT,
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.latent.triton:attend",
        refusals.LATENT_TRITON,
        into=True,
        reserve=_RESERVE_LATENT,
    ),
    Implementation("cpu", "quantpage.ops.attend.cpu:attend", refusals.CPU, whole=True, into=True),
    Implementation("torch", "quantpage.ops.attend.torch_blockwise:attend", refusals.NOTHING),
]
"""In order of preference."""


def attend(
    q: Queries,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    implementation: Implementation | str | None = None,
    model_basis: bool = False,
    lse_wanted: bool = True,
    out: Outputs | None = None,
) -> tuple[Outputs, LogSumExps | None]:
    """Output in the query's dtype and natural log-sum-exp in at least float32.

    implementation: a name, or what ``dispatch.choose`` gave; None: the first that serves the call.
    model_basis: turn the output back where values are cached rotated. lse_wanted: False where
    nobody reads the log-sum-exp, which is None then. out: where the output goes, and not to the
    memory of ``q``; None: new.

    Raises ValueError for what does not belong together, before anything runs, and
    NoImplementation where the one that was named cannot serve the call.
    """
    if not isinstance(implementation, Implementation):
        phase = phase_of(batch.max_query_len)
        call = call_of(layer.facts, q.shape[1], q.dtype, phase, params.mask.kind)
        implementation = find(CANDIDATES, call, implementation)
    if out is not None:
        check_out(out, q, layer.facts.out_dim)
    mapped = layer.key_map
    bare, missing = params, None
    if mapped is not None and mapped.mean is not None:
        if params.softcap is not None:
            raise ValueError(
                "key_map: expected one without a mean, as a capped score is no sum of its parts; "
                f"got one with a mean under softcap {params.softcap}"
            )
        if lse_wanted or params.sinks is not None:
            # Only then, as a sink's logit is compared with whole scores.
            bare = replace(params, sinks=None)
            missing = mapped.left_out(q, layer.key.spec.rotation == "hadamard")
    wanted = _Wanted(model_basis, lse_wanted or missing is not None, out)
    made, lse = _attend(q, layer, batch, bare, implementation, wanted)
    if missing is not None:
        assert lse is not None
        lse = lse + missing * params.softmax_scale
        if params.sinks is not None:
            made, lse = merge_partials([made], [lse], params.sinks, out=made)
    return made, lse if lse_wanted else None


class _Wanted(NamedTuple):
    """How the caller wants it; see ``attend``."""

    model_basis: bool
    lse: bool
    out: Tensor | None


def _attend(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    by: Implementation,
    wanted: _Wanted,
) -> tuple[Tensor, Tensor | None]:
    """``attend`` by scores of the keys as they are cached."""
    run, out = by.load(), wanted.out
    told: dict[str, Any] = {"out": out, "lse_wanted": wanted.lse} if by.into else {}
    if by.whole:
        made, lse = run(q, layer, batch, params, wanted.model_basis, **told)
        return _placed(made, out), lse
    turn = wanted.model_basis and layer.out_rotated
    if turn and by.turns and layer.exact_key is not None:
        turn, told["turned"] = False, True
    if layer.exact_key is None or by.joins:
        made, lse = run(q, layer, batch, params, **told)
    else:
        made, lse = _attend_segments(q, layer, batch, params, by, told)
    if turn:
        made = rotate_output(made)
    return _placed(made.to(q.dtype), out), lse


def _placed(made: Tensor, out: Tensor | None) -> Tensor:
    """``made``, in ``out`` where that was given."""
    return made if out is None or made is out else out.copy_(made)


def _attend_segments(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    by: Implementation,
    told: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Body and exact pages, each by a call, and their merge."""
    run = by.load()
    check_attend(q, layer, batch, params, needs_of(run))
    run, exact_batch = unchecked(run), batch.exact_step()
    # The sink is one key of the softmax: it enters once, in the merge.
    bare = replace(params, sinks=None)
    body = run(q, layer.body(), batch, bare, segment="body")
    near = run(q, layer.exact(), exact_batch, bare, segment="exact")
    out = contiguous(told.get("out"))
    if out is None and by.into:
        out = body[0].new_empty(body[0].shape, dtype=q.dtype)
    # Else it stays in float32 until it is turned back: a rotated row may be too large for float16
    # where the row itself is not.
    return by.load_merge()([body[0], near[0]], [body[1], near[1]], params.sinks, out=out)
