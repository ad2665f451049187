"""Pages to dense rows: export, foreign attention, prefill workspaces."""

from quantpage.ops import refusals
from quantpage.ops.dispatch import Implementation
from quantpage.ops.gather.reference import gather_request

__all__ = ["CANDIDATES", "gather_request"]


CANDIDATES: list[Implementation] = [
    Implementation("triton", "quantpage.ops.gather.triton:gather_request", refusals.GATHER_TRITON),
    Implementation("cpu", "quantpage.ops.gather.cpu:gather_request", refusals.CPU),
    Implementation("torch", "quantpage.ops.gather.reference:gather_request", refusals.NOTHING),
]
"""In order of preference."""
