"""Pages to dense rows: export, foreign attention, prefill workspaces."""

from quantpage.ops.dispatch import Call, Implementation
from quantpage.ops.gather.reference import gather_request

__all__ = ["CANDIDATES", "gather_request"]


def _torch_refusals(call: Call) -> list[str]:
    return []


CANDIDATES: list[Implementation] = [
    Implementation("torch", "quantpage.ops.gather.reference:gather_request", _torch_refusals),
]
"""In order of preference."""
