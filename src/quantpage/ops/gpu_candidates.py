"""What the Triton kernels of decode, write and gather serve, in sentences.

Imports no triton: dispatch asks for refusals on any machine.
"""

from importlib.util import find_spec

import torch

from quantpage.formats import QuantSpec
from quantpage.ops.dispatch import Call, Implementation, unknown_codes

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HOPPER_WIDTHS = (128, 256)
"""head_dims of the Hopper decode kernel, the same for keys and values."""


def _device_refusals(call: Call) -> list[str]:
    reasons = unknown_codes(call)
    if call.device.kind != "cuda":
        reasons.append(f"needs a CUDA device, got {call.device.kind}.")
    elif call.device.capability is not None and call.device.capability < (8, 0):
        reasons.append(f"needs compute capability 8.0 or later, got {call.device.capability}.")
    if find_spec("triton") is None:
        reasons.append("needs triton, which is not installed.")
    if call.dtype not in _FLOATS:
        reasons.append(f"queries of float16, bfloat16 or float32, got {call.dtype}.")
    widest = max(call.head_dim, call.value_head_dim)
    if widest > 256:
        reasons.append(f"head_dim up to 256, got {widest}.")
    for spec in (call.format.key, call.format.value):
        if spec.quantized and spec.scale_dtype == torch.float64:
            reasons.append("scales of float16 or float32, got float64.")
            break
    return reasons


def decode_refusals(call: Call) -> list[str]:
    """Split-KV decode in Triton."""
    reasons = _device_refusals(call)
    if call.phase != "decode":
        reasons.append(f"serves decode (at most 16 new tokens a request), got {call.phase}.")
    if call.mask not in ("causal", "full"):
        reasons.append(f"serves causal and full masks, got {call.mask}.")
    for name, spec, width in (
        ("key", call.format.key, call.head_dim),
        ("value", call.format.value, call.value_head_dim),
    ):
        if spec.quantized and spec.dynamic and spec.granularity.groups(width) > 1:
            groups = spec.granularity.groups(width)
            reasons.append(f"one dynamic scale a token and kv_head, got {groups} for a {name}.")
        words = 8 if spec.code.name == "int4" else 4
        if spec.quantized and width % words:
            reasons.append(f"{name} head_dim in whole 32-bit words, got {width}.")
        if not spec.quantized and call.dtype == torch.float32:
            reasons.append(f"16-bit {name} pages, got float32.")
    return reasons


def hopper_decode_refusals(call: Call) -> list[str]:
    """As the Triton kernel, and what the Hopper one needs besides."""
    reasons = decode_refusals(call)
    capability, widths = call.device.capability, (call.head_dim, call.value_head_dim)
    if capability is not None and capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, got {capability[0]}.{capability[1]}.")
    for name, spec in (("keys", call.format.key), ("values", call.format.value)):
        if not spec.quantized:
            reasons.append(f"reads codes, got {name} as they come.")
    if widths[0] != widths[1] or widths[0] not in HOPPER_WIDTHS:
        reasons.append(
            f"one head_dim of keys and values, 128 or 256, got {widths[0]} and {widths[1]}."
        )
    if not reasons and find_spec("triton.experimental.gluon") is None:
        reasons.append("needs Triton 3.6 or later, which brings Gluon.")
    return reasons


def write_refusals(call: Call) -> list[str]:
    """The fused write kernel."""
    reasons = _device_refusals(call)
    if call.in_turn:
        reasons.append("rounds each channel of a key by itself, got a key map with feedback.")
    for spec in (call.format.key, call.format.value):
        if spec.quantized and spec.dynamic and not _power_of_two(spec):
            reasons.append(
                f"groups of 16, 32, 64 .. channels with a scale, got {spec.granularity.group}."
            )
    return reasons


def gather_refusals(call: Call) -> list[str]:
    """The gather kernel."""
    return _device_refusals(call)


def _power_of_two(spec: QuantSpec) -> bool:
    group = spec.granularity.group
    return group is None or group & (group - 1) == 0


DECODE_CANDIDATES = [
    Implementation(
        "gluon", "quantpage.ops.attend.decode.gluon:attend", hopper_decode_refusals, joins=True
    ),
    Implementation(
        "triton", "quantpage.ops.attend.decode.triton:attend", decode_refusals, joins=True
    ),
]
WRITE_CANDIDATES = [
    Implementation("triton", "quantpage.ops.rope_write.triton:rope_write", write_refusals)
]
GATHER_CANDIDATES = [
    Implementation("triton", "quantpage.ops.gather.triton:gather_request", gather_refusals)
]
