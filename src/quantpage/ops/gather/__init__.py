"""Pages to dense rows: export, foreign attention, prefill workspaces."""

from quantpage.ops.cpu_refusals import refusals as cpu_refusals
from quantpage.ops.dispatch import Call, Implementation
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.gpu_candidates import GATHER_CANDIDATES

__all__ = ["CANDIDATES", "gather_request"]


def _torch_refusals(call: Call) -> list[str]:
    return []


CANDIDATES: list[Implementation] = [
    *GATHER_CANDIDATES,
    Implementation("cpu", "quantpage.ops.gather.cpu:gather_request", cpu_refusals),
    Implementation("torch", "quantpage.ops.gather.reference:gather_request", _torch_refusals),
]
"""In order of preference."""
