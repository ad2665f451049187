"""What launches of prefill and of interval masks share: dtypes of operands, memory for parts."""

from typing import Any

import torch
import triton.language as tl

from quantpage.cache.views import LayerKV
from quantpage.hardware import E4M3, device_info
from quantpage.ops.attend.flash.tiles import DenseTile, portable_width
from quantpage.ops.attend.results import Results
from quantpage.ops.operand import Operand

OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def operand_dtype(half: Operand) -> torch.dtype:
    """Of what keys (queries) or values (probabilities) are multiplied by: float16 beside codes,
    else the pages' own. Halves may differ: bfloat16 keys beside values in codes."""
    return torch.float16 if half.code else half.codes.dtype


def strides(key: Operand, value: Operand) -> tuple[int, ...]:
    """Of a page and of a kv_head, in the order that kernels take them."""
    return (*key.strides, *value.strides, *key.scale_strides, *value.scale_strides)


def compiled(
    key: Operand, value: Operand, group: int, tile: DenseTile, device: torch.device
) -> dict[str, Any]:
    """What portable kernels are compiled for: both halves, a tile of queries by keys, a device."""
    return {
        "G": group, "D": key.head_dim, "DV": value.head_dim, "DP": portable_width(key.head_dim),
        "DVP": portable_width(value.head_dim), "BM": tile.rows, "BN": tile.keys,
        "STAGES": tile.stages, "OPERAND": OPERANDS[operand_dtype(key)],
        "SHIFT": shift(operand_dtype(value)), "OLD": device_info(device).before(E4M3),
        "K_CODE": key.code, "K_SCALED": key.scaled, "K_ZERO": key.has_zero, "K_GROUPS": key.groups,
        "V_CODE": value.code, "V_SCALED": value.scaled, "V_ZERO": value.has_zero,
        "V_GROUPS": value.groups,
    }  # fmt: skip


def shift(probabilities: torch.dtype) -> int:
    """By how many powers of two probabilities are multiplied, which cancels in the end: small ones
    stay out of float16's subnormals."""
    return 8 if probabilities == torch.float16 else 0


def workspace_dtype(layer: LayerKV) -> torch.dtype:
    """float16 where numbers are code * scale, else the dtype of the cache."""
    if layer.key.spec.quantized or layer.value.spec.quantized:
        return torch.float16
    return layer.key.codes.dtype


def parts_for(results: Results, parts: int) -> Results:
    """Memory for ``parts`` partial results, [parts, tokens, ...] in float32."""
    out = results.out
    made = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    return Results(made, torch.empty(made.shape[:-1], dtype=torch.float32, device=out.device))
