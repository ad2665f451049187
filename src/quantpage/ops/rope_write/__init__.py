"""Norm, rotate, quantize and scatter new tokens into pages."""

from quantpage.ops import refusals
from quantpage.ops.dispatch import Implementation
from quantpage.ops.rope_write.params import QKNorm, WriteParams, Written

__all__ = ["CANDIDATES", "QKNorm", "WriteParams", "Written"]


CANDIDATES: list[Implementation] = [
    Implementation("triton", "quantpage.ops.rope_write.triton:rope_write", refusals.WRITE_TRITON),
    Implementation("cpu", "quantpage.ops.rope_write.cpu:rope_write", refusals.CPU),
    Implementation("torch", "quantpage.ops.rope_write.reference:rope_write", refusals.NOTHING),
]
"""In order of preference."""
