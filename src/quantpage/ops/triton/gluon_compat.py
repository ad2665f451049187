"""The Gluon calls that Triton renames, under one name each.

Triton 3.6 to 3.8 spell the TMA load ``tma.async_copy_global_to_shared``, 3.9 ``tma.async_load``.
Kernels import from here, so that a rename is one line.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
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
    "async_copy",
    "fence_async_shared",
    "mbarrier",
    "mma_v2",
    "thread_barrier",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
