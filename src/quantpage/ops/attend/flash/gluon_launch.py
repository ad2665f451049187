"""How a 16-bit workspace is given to the Hopper kernels: rows to TMA, given scales of its codes."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.ops.operand import Operand
from quantpage.ops.triton.gluon_compat import TensorDescriptor

_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(rows: Tensor, keys: int, padded: int) -> TensorDescriptor:
    """TMA over all heads' rows; channels past head_dim read as 0."""
    flat = rows.flatten(0, 1)
    layout = gl.NVMMASharedLayout.get_default_for([keys, padded], _GLUON_DTYPES[rows.dtype])
    return TensorDescriptor.from_tensor(flat, [keys, padded], layout)


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
