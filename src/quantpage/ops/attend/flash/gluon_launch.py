"""How a 16-bit workspace is given to the Hopper kernels: rows to TMA, given scales of its codes."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.tiles import DenseTile, hopper_width
from quantpage.ops.attend.flash.triton_launch import shift
from quantpage.ops.operand import Operand
from quantpage.ops.triton.gluon_compat import TensorDescriptor

_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(rows: Tensor, keys: int) -> TensorDescriptor:
    """TMA over all heads' rows, tiles of ``keys``; channels past head_dim read as 0."""
    flat, padded = rows.flatten(0, 1), hopper_width(rows.shape[2])
    layout = gl.NVMMASharedLayout.get_default_for([keys, padded], _GLUON_DTYPES[rows.dtype])
    return TensorDescriptor.from_tensor(flat, [keys, padded], layout)


def compiled(q: Tensor, k: Tensor, v: Tensor, group: int, tile: DenseTile) -> dict[str, Any]:
    """What the Hopper kernels are compiled for: the widths of queries and of the workspace's rows,
    and a tile of queries by keys."""
    head_dim, width = q.shape[2], v.shape[2]
    return {
        "G": group, "D": head_dim, "DV": width, "BM": tile.rows, "BN": tile.keys,
        "DP": hopper_width(head_dim), "DVP": hopper_width(width), "STAGES": tile.stages,
        "SHIFT": shift(k.dtype),
    }  # fmt: skip


def value_scales(
    values: Operand | None,
) -> tuple[tuple[Tensor | None, Tensor | None, int], dict[str, Any]]:
    """Scales, zeros and stride of given scales, and what is compiled of them.

    values: whose scales are given, so that the workspace holds their codes; None: numbers.
    """
    if values is None:
        return (None, None, 0), {"V_STATIC": False, "V_ZERO": False, "V_GROUPS": 1}
    fixed = {"V_STATIC": True, "V_ZERO": values.has_zero, "V_GROUPS": values.groups}
    return (values.scale, values.zero, values.scale_strides[1]), fixed
