"""How rows of a 16-bit workspace are given to TMA."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.ops.triton.gluon_compat import TensorDescriptor

_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(rows: Tensor, keys: int, padded: int) -> TensorDescriptor:
    """TMA over all heads' rows; channels past head_dim read as 0."""
    flat = rows.flatten(0, 1)
    layout = gl.NVMMASharedLayout.get_default_for([keys, padded], _GLUON_DTYPES[rows.dtype])
    return TensorDescriptor.from_tensor(flat, [keys, padded], layout)
