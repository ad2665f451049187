"""Norm, rotate, quantize and scatter new tokens into pages."""

from quantpage.ops.dispatch import Call, Implementation
from quantpage.ops.rope_write.params import QKNorm, WriteParams, Written

__all__ = ["CANDIDATES", "QKNorm", "WriteParams", "Written"]


def _torch_refusals(call: Call) -> list[str]:
    return []


CANDIDATES: list[Implementation] = [
    Implementation("torch", "quantpage.ops.rope_write.reference:rope_write", _torch_refusals),
]
"""In order of preference."""
