"""Norm, rotate, quantize and scatter new tokens into pages."""

from quantpage.ops.cpu_refusals import refusals as cpu_refusals
from quantpage.ops.dispatch import Implementation, refuse_nothing
from quantpage.ops.gpu_candidates import WRITE_CANDIDATES
from quantpage.ops.rope_write.params import QKNorm, WriteParams, Written

__all__ = ["CANDIDATES", "QKNorm", "WriteParams", "Written"]


CANDIDATES: list[Implementation] = [
    *WRITE_CANDIDATES,
    Implementation("cpu", "quantpage.ops.rope_write.cpu:rope_write", cpu_refusals),
    Implementation("torch", "quantpage.ops.rope_write.reference:rope_write", refuse_nothing),
]
"""In order of preference."""
