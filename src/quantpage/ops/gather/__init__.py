"""Pages to dense rows: export, foreign attention, prefill workspaces."""

from quantpage.ops.cpu_refusals import refusals as cpu_refusals
from quantpage.ops.dispatch import Implementation, refuse_nothing
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.gpu_candidates import GATHER_CANDIDATES

__all__ = ["CANDIDATES", "gather_request"]


CANDIDATES: list[Implementation] = [
    *GATHER_CANDIDATES,
    Implementation("cpu", "quantpage.ops.gather.cpu:gather_request", cpu_refusals),
    Implementation("torch", "quantpage.ops.gather.reference:gather_request", refuse_nothing),
]
"""In order of preference."""
