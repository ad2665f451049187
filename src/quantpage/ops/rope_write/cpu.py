"""Norm, rotate, quantize and scatter in the compiled core, a token at a time in registers.

The arithmetic is that of reference.py, operation by operation in float32; only the Hadamard
rotation (butterflies instead of a matrix product) and the mean of a norm sum in another order, so
that codes differ on rounding ties alone.
"""

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.cpu_core import core
from quantpage.cpu_core.interface import WRITE
from quantpage.cpu_core.records import CODES, layer_record, step_record
from quantpage.ops import refusals
from quantpage.ops.checks import Needs, writes
from quantpage.ops.rope_write.params import WriteParams, Written
from quantpage.ops.rope_write.reference import refuse_non_finite
from quantpage.ops.rows import Keys, Queries, Values


@writes(Needs(refusals.CPU, kind="cpu"))
def rope_write(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams,
    isa: int | None = None,
) -> Written:  # fmt: skip
    """Write one step's K and V into their pages; rows with slot -1 are skipped.

    isa: an index of cpu_core.ISAS that the machine runs; None: the widest. Raises
    NonFiniteInput in checked mode, before anything is written.
    """
    library = core()
    if params.checked:
        refuse_non_finite(k, "key", params.layer)
        refuse_non_finite(v, "value", params.layer)
    kept: list[Tensor] = []
    dtype = k.dtype
    if params.bias is not None:
        # Widened, as the reference adds it.
        q_bias, k_bias, v_bias = (each.float() for each in params.bias)
        q = None if q is None else q + q_bias
        k, v = k + k_bias, v + v_bias
    turned = None
    if layer.latent and q is not None:
        # Absorbed queries are as wide as both halves, which the core turns each by its own rows.
        turned = layer.turned(q).to(q.dtype)
        q = None
    q = None if q is None else _rows(q, k.dtype)
    k, v = _rows(k, k.dtype), _rows(v, k.dtype)
    tokens, kv_heads, _ = k.shape
    q_out = None if q is None else torch.empty(q.shape, dtype=k.dtype, device="cpu")
    k_rows = torch.empty(k.shape, dtype=k.dtype, device="cpu") if params.return_rows else None
    v_rows = torch.empty(v.shape, dtype=k.dtype, device="cpu") if params.return_rows else None
    cos, sin, half_rotary, interleaved = _rope_fields(params, kept)
    q_norm, k_norm, norm_after = _norm_fields(params, kept)
    call = WRITE.pack(
        q=_address(q),
        k=k.data_ptr(),
        v=v.data_ptr(),
        type=CODES[k.dtype],
        q_token=0 if q is None else q.stride(0),
        q_head=0 if q is None else q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        q_out=_address(q_out),
        k_rows=_address(k_rows),
        v_rows=_address(v_rows),
        cos=cos,
        sin=sin,
        half_rotary=half_rotary,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_after=norm_after,
        tokens=tokens,
        q_heads=0 if q is None else q.shape[1],
        kv_heads=kv_heads,
        threads=torch.get_num_threads(),
        isa=library.isa if isa is None else isa,
        eps=0.0 if params.norm is None else params.norm.eps,
    )
    if library.write(layer_record(layer) + step_record(batch) + call):
        raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
    if params.bias is not None and dtype != k.dtype:
        narrow = [None if each is None else each.to(dtype) for each in (q_out, k_rows, v_rows)]
        return Written(*narrow)
    return Written(q_out if turned is None else turned, k_rows, v_rows)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the common dtype, channels contiguous."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rope_fields(params: WriteParams, kept: list[Tensor]) -> tuple[int, int, int, int]:
    rope = params.rope
    if rope is None:
        return 0, 0, 0, 0
    cos, sin = _float32(rope.cos, kept), _float32(rope.sin, kept)
    return cos.data_ptr(), sin.data_ptr(), rope.cos.shape[1], int(rope.interleaved)


def _norm_fields(params: WriteParams, kept: list[Tensor]) -> tuple[int, int, int]:
    norm = params.norm
    if norm is None:
        return 0, 0, 0
    q_weight, k_weight = _float32(norm.q_weight, kept), _float32(norm.k_weight, kept)
    return q_weight.data_ptr(), k_weight.data_ptr(), int(norm.after_rope)


def _float32(x: Tensor, kept: list[Tensor]) -> Tensor:
    """As the core reads it; ``kept`` holds a copy until the call is over."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    kept.append(x.float().contiguous())
    return kept[-1]
