"""What the compiled CPU core can serve; every op asks here."""

import torch

from quantpage.cpu_core import absence
from quantpage.ops.dispatch import Call, unknown_codes

MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusals(call: Call) -> list[str]:
    """Sentences, each with the got and the wanted value."""
    if call.device.kind != "cpu":
        return [f"needs a CPU, got {call.device.kind}."]
    missing = absence()
    if missing:
        return [missing]
    said = unknown_codes(call)
    for name, width in (("head_dim", call.head_dim), ("value_head_dim", call.value_head_dim)):
        if width % 16 or width > MAX_HEAD_DIM:
            said.append(f"{name} must be a multiple of 16 up to {MAX_HEAD_DIM}, got {width}.")
    if call.dtype not in DTYPES:
        said.append(f"queries must have 16 or 32 bits, got {call.dtype}.")
    for name, spec in (("keys", call.format.key), ("values", call.format.value)):
        if spec.quantized and spec.dynamic and spec.scale_dtype == torch.float64:
            said.append(f"scales of {name} must have 16 or 32 bits, got {spec.scale_dtype}.")
    return said
