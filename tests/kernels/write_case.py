"""The write kernel as ahead-of-time compile cases."""

import json
import sys

from quantpage.hardware import DeviceInfo
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.rope_write.triton_in_turn import Coupling
from quantpage.ops.rope_write.triton_in_turn_kernel import in_turn_kernel
from quantpage.ops.rope_write.triton_in_turn_lanes import Lanes
from quantpage.ops.rope_write.triton_in_turn_lanes_kernel import in_lanes_kernel
from quantpage.ops.rope_write.triton_kernel import Pages
from quantpage.ops.rope_write.triton_products import layout_holds
from quantpage.ops.rope_write.triton_turn import ROWS, columns_of, turn_kernel
from tests.kernels.aot import SHARED, compile_kernel, resources
from tests.kernels.decode_case import write_arguments

FORMATS = {"none": (0, 1, False), "int8": (1, 128, False), "fp8": (2, 1, False)}
FORMATS["int4"] = (3, 128, True)
FORMATS["int4 mapped"] = (3, 128, True, 2)
FORMATS["int4 near int8"] = (3, 128, True, 0, 128, 1)
FORMATS |= {name: (CODE_KINDS[name], 128, True) for name in ("int6", "int3")}


def in_turn_arguments(factors: int, tried: int, rows: int):
    """Keys in turn: int4 of two ranges, or int8 of one, with near pages in int8."""
    width, four = 128, factors > 1
    code = "*u8" if four else "*i8"
    types = dict.fromkeys(("k", "k_seen", "weight", "bias"), "*bf16")
    types["pages"] = Pages(code, "*fp16", "*fp16", code, *["i32:16"] * 6)
    types["near_pages"] = Pages("*i8", "*fp16", "*fp16", "*i8", *["i32:16"] * 6)
    types |= dict.fromkeys(("slots", "exact_slots", "positions"), "*i64")
    types |= dict.fromkeys(("cos", "sin", "map_scale", "map_mean", "own"), "*fp32")
    types |= {"own_codes": "*i8", "eps": "fp32", "tokens": "i32", "kv_heads": "i32"}
    types |= dict.fromkeys(("coupling", "near_coupling"), Coupling("*fp32", "*fp16", "*fp16"))
    for name in in_turn_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    fixed = {
        "CODE": 3 if four else 1, "SCALES": 1, "ZERO": four, "SHARED": width, "LIMIT": 65504.0,
        "FACTORS": (0.96, 0.88)[:factors] if four else (1.0,), "TRIED": tried, "HADAMARD": width,
        "NEAR_CODE": 1, "NEAR_ZERO": False, "NEAR_SHARED": width, "NEAR_LIMIT": 65504.0,
        "NEAR_FACTORS": (1.0,), "NEAR_TRIED": 1,
        "HEAD_DIM": width, "PIECE": 32, "ROTARY": width, "INTERLEAVED": False, "NORM": 0,
        "BIAS": False, "MAPPED": 2, "PAGE": 64, "EXACT": True, "RETURN": False, "HARDWARE": True,
        "ROWS": rows, "OWN": width * rows + 2 * rows,
        "OWN_CODES": rows * tried * width, "MADE": False, "OVERLAP": False,
    }  # fmt: skip
    return types | fixed


def in_turn(factors: int, tried: int, rows: int, capability: int) -> dict[str, int]:
    """What such a kernel takes."""
    compiled = compile_kernel(
        in_turn_kernel, in_turn_arguments(factors, tried, rows), capability,
        num_warps=max(1, rows * tried // 32), num_stages=1,
    )  # fmt: skip
    takes = resources(compiled)
    return {
        "registers": takes.registers, "stack": takes.stack, "shared": takes.shared,
        "products": takes.find("HMMA"), "instructions": sum(takes.counts.values()),
    }  # fmt: skip


def in_lanes(factors: int, capability: int) -> dict[str, int]:
    """What the kernel takes whose rows stay in registers."""
    arguments = in_turn_arguments(factors, factors, 32)
    arguments |= {"lanes": Lanes("*fp32", "*i32", "*fp32")}
    arguments["near_lanes"] = arguments["lanes"]
    arguments["RETURN"] = True
    arguments = {name: arguments[name] for name in in_lanes_kernel.arg_names}
    compiled = compile_kernel(in_lanes_kernel, arguments, capability, num_warps=4)
    takes = resources(compiled)
    return {
        "registers": takes.registers, "stack": takes.stack, "products": takes.find("HMMA"),
        "moved": takes.find("SHFL"), "instructions": sum(takes.counts.values()),
        "layout": layout_holds(compiled.asm["ttgir"]),
    }  # fmt: skip


def matrix(width: int, capability: int) -> dict[str, int]:
    """What the kernel of a key map's matrix takes, of as many columns as such a device is given."""
    device = DeviceInfo("cuda", "", divmod(capability, 10), 1, SHARED[capability])
    arguments = dict.fromkeys(("q", "k", "q_out", "k_out", "matrices"), "*bf16")
    arguments |= {"offset": "*fp32"}
    arguments |= dict.fromkeys(("tokens", "group", "kv_heads", "programs"), "i32")
    arguments |= dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i32:16")
    arguments |= {
        "HEAD_DIM": width, "ROWS": ROWS, "COLUMNS": columns_of(64, width, True, device),
        "HALVES": True, "MEAN": True, "OVERLAP": capability >= 90,
    }  # fmt: skip
    compiled = compile_kernel(turn_kernel, arguments, capability, num_warps=4)
    takes = resources(compiled)
    return {
        "products": takes.find("HMMA|HGMMA|UTCHMMA"), "stack": takes.stack,
        "shared": takes.shared, "loads": takes.in_loop(r"LDG\.E\.128"),
    }  # fmt: skip


def main() -> None:
    found = {}
    if "matrix" in sys.argv:
        for capability in SHARED:
            for width in (128, 256):
                found[f"{width} {capability}"] = matrix(width, capability)
        print(json.dumps(found))
        return
    if "lanes" in sys.argv:
        for capability in SHARED:
            found[f"two ranges {capability}"] = in_lanes(2, capability)
        found["one range 90"] = in_lanes(1, 90)
        print(json.dumps(found))
        return
    if "turn" in sys.argv:
        for capability in SHARED:
            found[f"few {capability}"] = in_turn(2, 2, 16, capability)
        found["many 90"] = in_turn(2, 1, 32, 90)
        print(json.dumps(found))
        return
    for name, given in FORMATS.items():
        kernel, arguments = write_arguments(*given)
        if name == "none":
            arguments |= {"K_SCALES": 0, "V_SCALES": 0}
        compiled = compile_kernel(kernel, arguments, 90, num_warps=1)
        takes = resources(compiled)
        found[name] = {
            "registers": takes.registers,
            "spills": takes.find("LDL|STL"),
            "products": takes.find("HMMA"),
            "shuffles": takes.find("SHFL"),
            "instructions": sum(takes.counts.values()),
            "layout": layout_holds(compiled.asm["ttgir"]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
