"""Who serves interval masks, and why one cannot: rows for ops/attend's CANDIDATES.

Imports no triton: dispatch asks for refusals on any machine.
"""

from quantpage.ops.dispatch import Call, Implementation


def triton_refusals(call: Call) -> list[str]:
    """Any format and phase, on CUDA, under an interval mask."""
    reasons = []
    if call.mask != "interval":
        reasons.append(f"serves interval masks, got {call.mask}.")
    if call.device.kind != "cuda":
        reasons.append(f"needs a CUDA device, got {call.device.kind}.")
    if max(call.head_dim, call.value_head_dim) > 256:
        reasons.append(f"head_dim up to 256, got {max(call.head_dim, call.value_head_dim)}.")
    return reasons


def gluon_refusals(call: Call) -> list[str]:
    """Prefill on Hopper."""
    reasons = triton_refusals(call)
    if call.device.capability is not None and call.device.capability[0] != 9:
        reasons.append(f"needs Hopper (9.0), got {call.device.capability}.")
    if call.phase != "prefill":
        reasons.append(f"serves prefill, got {call.phase}.")
    return reasons


MASK_CANDIDATES: list[Implementation] = [
    Implementation("gluon_mask", "quantpage.ops.attend.gluon_flash_mask:attend", gluon_refusals),
    Implementation("triton_mask", "quantpage.ops.attend.triton_flash_mask:attend", triton_refusals),
]
"""In order of preference."""
