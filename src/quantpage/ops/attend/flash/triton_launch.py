"""What launches of prefill and of interval masks share: dtypes of operands, memory for parts."""

from typing import Any

import torch
import triton.language as tl

from quantpage.cache.views import LayerKV
from quantpage.ops.attend.results import Results
from quantpage.ops.operand import Operand

OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def operand_dtype(key: Operand, value: Operand) -> torch.dtype:
    """Of queries and probabilities in products: float16 beside codes, else the pages' own."""
    return torch.float16 if key.code or value.code else key.codes.dtype


def strides(key: Operand, value: Operand) -> tuple[int, ...]:
    """Of a page and of a kv_head, in the order that kernels take them."""
    return (*key.strides, *value.strides, *key.scale_strides, *value.scale_strides)


def compiled(key: Operand, value: Operand) -> dict[str, Any]:
    """What kernels are compiled for of both halves."""
    return {
        "K_CODE": key.code, "K_SCALED": key.scaled, "K_ZERO": key.has_zero, "K_GROUPS": key.groups,
        "V_CODE": value.code, "V_SCALED": value.scaled, "V_ZERO": value.has_zero,
        "V_GROUPS": value.groups,
    }  # fmt: skip


def workspace_dtype(layer: LayerKV, query_dtype: torch.dtype) -> torch.dtype:
    """float16 where numbers are code * scale, else the dtype of the cache."""
    if layer.key.spec.quantized or layer.value.spec.quantized:
        return torch.float16
    return layer.key.codes.dtype


def parts_for(results: Results, parts: int) -> Results:
    """Memory for ``parts`` partial results, [parts, tokens, ...] in float32."""
    out = results.out
    made = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    return Results(made, torch.empty(made.shape[:-1], dtype=torch.float32, device=out.device))
