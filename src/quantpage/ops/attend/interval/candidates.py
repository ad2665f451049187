"""Who serves interval masks, and why one cannot: rows for ops/attend's CANDIDATES.

Imports no triton: dispatch asks for refusals on any machine.
"""

from dataclasses import replace

from quantpage.ops.attend.prefill.ways import TRITON_MERGE, gluon_refusals, triton_refusals
from quantpage.ops.dispatch import Call, Implementation


def triton_mask_refusals(call: Call) -> list[str]:
    """As the portable prefill kernel, in every phase, under an interval mask."""
    return [
        *_mask_refusals(call),
        *triton_refusals(replace(call, mask="causal", phase="prefill")),
    ]


def gluon_mask_refusals(call: Call) -> list[str]:
    """As the Hopper prefill kernel, under an interval mask."""
    return [*_mask_refusals(call), *gluon_refusals(replace(call, mask="causal"))]


def _mask_refusals(call: Call) -> list[str]:
    return [] if call.mask == "interval" else [f"Takes interval masks, got {call.mask}."]


MASK_CANDIDATES: list[Implementation] = [
    Implementation(
        "gluon",
        "quantpage.ops.attend.interval.gluon:attend",
        gluon_mask_refusals,
        merge=TRITON_MERGE,
    ),
    Implementation(
        "triton",
        "quantpage.ops.attend.interval.triton:attend",
        triton_mask_refusals,
        merge=TRITON_MERGE,
    ),
]
"""In order of preference."""
