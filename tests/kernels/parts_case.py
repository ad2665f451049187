"""Norm and rotary embedding of a model as ahead-of-time compile cases."""

import json
import re

from quantpage.ops.triton.norm import norm_kernel
from quantpage.ops.triton.rotary import OPTIONS, rotary_kernel
from tests.kernels.aot import SHARED, compile_kernel, resources


def norm(width: int, block: int, tile: int, warps: int, capability: int):
    """Of bfloat16 rows."""
    types = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"rows": "i32", "eps": "fp32"}
    fixed = {"WIDTH": width, "BLOCK": block, "TILE": tile}
    return compile_kernel(norm_kernel, types | fixed, capability, num_warps=warps)


def rotary(half: int, block: int, capability: int):
    """Of bfloat16 heads."""
    pointers = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), "*bf16")
    fixed = {"HALF": half, "BLOCK": block, "HEADS": 8}
    types = dict.fromkeys(rotary_kernel.arg_names, "i32") | pointers | fixed
    return compile_kernel(rotary_kernel, types, capability, **OPTIONS)


def main() -> None:
    """Every case as JSON."""
    found = {}
    for capability in SHARED:
        cases = {
            "norm 4096": norm(4096, 4096, 1, 8, capability),
            "norm 16384": norm(16384, 16384, 1, 8, capability),
            "norm 128": norm(128, 128, 8, 4, capability),
            "rotary 128": rotary(64, 64, capability),
            "rotary 80": rotary(40, 64, capability),
        }
        for name, compiled in cases.items():
            takes = resources(compiled)
            found[f"{name} on {capability}"] = {
                "registers": takes.registers,
                "stack": takes.stack + takes.local,
                "shared": takes.shared,
                "of 16 bits": len(
                    re.findall(r"\b(?:mul|add|sub|fma)\S*\.bf16", compiled.asm["ptx"])
                ),
                "wide": takes.find(r"LDG\.E(\.\w+)*\.(64|128)"),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
