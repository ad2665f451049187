"""The Gluon calls that Triton renames, under one name each.

Triton 3.6 to 3.8 spell the TMA load ``tma.async_copy_global_to_shared``, 3.9 ``tma.async_load``.
Kernels import from here, so that a rename is one line.
"""

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "mbarrier",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
