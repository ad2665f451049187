"""Norm, rotate, quantize, scatter: the true statement, and the CPU path of torch.

Everything between the projection and the code is computed in float32 (float64 for float64
inputs) and rounded once.
"""

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.errors import NonFiniteInput
from quantpage.formats import dequantize, quantize, quantize_static, rotate
from quantpage.formats.feedback import quantize_with_feedback
from quantpage.formats.quantize import finite_rows
from quantpage.ops.checks import ANY, writes
from quantpage.ops.rope_write.params import QKNorm, WriteParams, Written
from quantpage.ops.rows import Keys, Queries, Values
from quantpage.rope import apply_rope


@writes(ANY)
def rope_write(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams
) -> Written:
    """Write one step's K and V into their pages; rows with slot -1 are skipped.

    Raises NonFiniteInput in checked mode, before anything is written.
    """
    if params.checked:
        refuse_non_finite(k, "key", params.layer)
        refuse_non_finite(v, "value", params.layer)
    q_in, k_in = q, k
    q, k, v = biased(q, k, v, params)
    q, k = norm_and_rope(q, k, batch, params)
    q = None if q is None else layer.turned(q)
    if layer.key_map is not None:
        k = layer.key_map.keys(k)
    if layer.key.spec.rotation == "hadamard":
        k = rotate(_wide(k))
    if layer.value.spec.rotation == "hadamard":
        v = rotate(_wide(v))
    feedback = None if layer.key_map is None else layer.key_map.feedback
    k_rows = _write(k, layer.key, batch.slots, feedback)
    v_rows = _write(v, layer.value, batch.slots)
    if batch.exact is not None and layer.exact_key is not None:
        exact = layer.exact()
        for rows, half, by in ((k, exact.key, feedback), (v, exact.value, None)):
            if half.spec.quantized:
                # Codes that are no integers have no next one to round to.
                by = by if half.spec.code.integer else None
                _write(rows, half, batch.exact.slots, by)
            else:
                _write(finite_rows(rows, half.codes.dtype), half, batch.exact.slots)
    return Written(
        None if q is None or q_in is None else q.to(q_in.dtype),
        k_rows.to(k_in.dtype) if params.return_rows else None,
        v_rows.to(k_in.dtype) if params.return_rows else None,
    )


def biased(q: Tensor | None, k: Tensor, v: Tensor, params: WriteParams):
    """Rows and the biases of their projections."""
    if params.bias is None:
        return q, k, v
    q_bias, k_bias, v_bias = params.bias
    # Widened first: a sum in 16 bits would be rounded before it is rotated.
    return None if q is None else _wide(q) + q_bias, _wide(k) + k_bias, _wide(v) + v_bias


def norm_and_rope(q: Tensor | None, k: Tensor, batch: BatchPlan, params: WriteParams):
    """Queries and keys as attention has them."""
    norm, rope = params.norm, params.rope
    if norm is not None and not norm.after_rope:
        q, k = _normed(q, k, norm)
    if rope is not None:
        q = None if q is None else apply_rope(q, batch.positions, rope)
        k = apply_rope(k, batch.positions, rope)
    if norm is not None and norm.after_rope:
        q, k = _normed(q, k, norm)
    return q, k


def _normed(q: Tensor | None, k: Tensor, norm: QKNorm):
    return (
        None if q is None else _rms_norm(q, norm.q_weight, norm.eps),
        _rms_norm(k, norm.k_weight, norm.eps),
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    work = _wide(x)
    return work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps) * weight.to(work.dtype)


def _write(
    rows: Tensor, pages: QuantizedPages, slots: Tensor, feedback: Tensor | None = None
) -> Tensor:
    """Quantize rows, scatter them, and return them round-tripped."""
    spec = pages.spec
    given = (None, None) if spec.dynamic else (pages.scale, pages.zero)
    if feedback is not None:
        made = quantize_with_feedback(rows, spec, feedback, *given)
    elif given[0] is not None:
        made = quantize_static(rows, given[0], given[1], spec)
    else:
        made = quantize(rows, spec)
    scale, zero = (made.scale, made.zero) if spec.dynamic else given
    seen = dequantize(made.codes, scale, zero, spec, _wide(rows).dtype)
    keep = slots >= 0
    page, offset = slots[keep] // pages.page_size, slots[keep] % pages.page_size
    planes = ((pages.codes, made.codes), (pages.scale, made.scale), (pages.zero, made.zero))
    for plane, fresh in planes:
        if plane is not None and fresh is not None:
            _scatter(plane, page, offset, fresh[keep])
    return seen


def _scatter(plane: Tensor, page: Tensor, offset: Tensor, rows: Tensor) -> None:
    rows = rows.to(plane.dtype)
    if plane.dtype == torch.float8_e4m3fn:
        plane, rows = plane.view(torch.uint8), rows.view(torch.uint8)
    plane[page, :, offset] = rows


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def refuse_non_finite(rows: Tensor, name: str, layer: int) -> None:
    """Raise NonFiniteInput that names layer, tensor and the first bad token; reads back from the
    device."""
    bad = ~torch.isfinite(rows).flatten(1).all(1)
    if bad.any():
        token = int(bad.nonzero()[0])
        raise NonFiniteInput(
            f"layer {layer}, {name}, token {token} of the step: expected finite numbers, "
            f"got NaN or infinity"
        )
