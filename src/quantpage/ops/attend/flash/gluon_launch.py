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


def query_tiles(q: Tensor, group: int, tile: DenseTile) -> TensorDescriptor | None:
    """TMA over a tile's queries [tokens, query heads of a kv_head, channels].

    None where a tile is no whole number of tokens, where TMA does not reach them (addresses are
    multiples of 16 bytes), and where wide rows leave no shared memory for them.
    """
    padded = hopper_width(q.shape[2])
    places = (q.data_ptr(), q.stride(0) * q.itemsize, q.stride(1) * q.itemsize)
    if tile.rows % group or padded > 128 or tile.keys < 128 or any(at % 16 for at in places):
        return None
    block = [tile.rows // group, group, padded]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON_DTYPES[q.dtype])
    return TensorDescriptor(q, list(q.shape), list(q.stride()), block, layout)


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
