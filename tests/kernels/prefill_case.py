"""Prefill kernels as ahead-of-time compile cases.

Run as a program it compiles every case and prints what each takes as JSON: kernels are compiled
in a process of their own, as Triton decides at import whether it interprets.
"""

import dataclasses
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quantpage.ops.attend.flash.tiles import hopper_tile, portable_tile, portable_width
from quantpage.ops.attend.params import SEGMENTS
from quantpage.ops.attend.prefill.gluon_kernel import prefill_kernel
from quantpage.ops.attend.prefill.triton_kernel import prefill_pages_kernel
from quantpage.ops.operand import CODE_KINDS
from tests.kernels.aot import SHARED, compile_kernel, resources

CODE = CODE_KINDS | {"float32": 0, "bfloat16": 0}

OPERANDS = {"float32": tl.float32, "bfloat16": tl.bfloat16}


def pages_arguments(
    code="int8", head_dim=128, capability=90, rows=512, page=64, segment=0, value=None
):
    """Keys of a code and values of the same or another, a scale a token (and a zero for less than 8
    bits), 32/8 heads."""
    codes = {"k": code, "v": value or code}
    width = portable_width(head_dim)
    tile, warps = portable_tile(width, rows, 4 if code == "float32" else 2, SHARED[capability])
    pointers = {
        "none": "*fp16",
        "float32": "*fp32",
        "bfloat16": "*bf16",
        "int8": "*i8",
        "fp8": "*u8",
        "int4": "*u8",
        "int6": "*i32",
        "int3": "*i32",
    }
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "lse_ptr": "*fp32", "sinks_ptr": "*fp32"}
    for side in "kv":
        types[f"{side}_codes"] = pointers[codes[side]]
        types[f"{side}_scale"] = types[f"{side}_zero"] = "*fp16"
    for name in ("page_table", "order", "work"):
        types[name] = "*i32"
    for name in ("scale", "cap"):
        types[name] = "fp32"
    for name in ("heads", "head0", "part_rows", "window", "sink_tokens", "table_row"):
        types[name] = "i32"
    for name in prefill_pages_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    fixed = {
        "G": 4, "D": head_dim, "DV": head_dim, "DP": width, "DVP": width,
        "BM": tile.rows, "BN": tile.keys,
        "SLOTS": page, "PAGE": page,
        "WINDOW": False,
        "CAUSAL": True, "SEGMENT": segment, "SOFTCAP": False, "SINKS": False,
        "SHIFT": 0 if code == "float32" else 8, "OLD": capability < 89,
        "STAGES": tile.stages, "OPERAND": OPERANDS.get(code, tl.float16),
    }  # fmt: skip
    for side, own in codes.items():
        fixed |= {
            f"{side.upper()}_CODE": CODE[own], f"{side.upper()}_SCALED": int(CODE[own] > 0),
            f"{side.upper()}_ZERO": own in ("int6", "int4", "int3"), f"{side.upper()}_GROUPS": 1,
        }  # fmt: skip
    return types | fixed, warps


def compile_dense(head_dim=128, dtype="fp16", **flags):
    """The Hopper kernel, by default plain causal attention over a float16 workspace."""
    tile = hopper_tile(head_dim, head_dim)
    element = gl.float16 if dtype == "fp16" else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([tile.keys, head_dim], element)
    rows = f"tensordesc<{dtype}[{tile.keys}, {head_dim}],{layout!r}>"
    types = {"k_desc": rows, "v_desc": rows, "q_ptr": "*bf16", "out_ptr": "*bf16"}
    group = flags.get("G", 4)
    if head_dim <= 128 and tile.rows % group == 0 and not flags.get("NEAR"):
        block = [tile.rows // group, group, head_dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        types["q_desc"] = f"tensordesc<bf16{block},{layout!r}>"
    types |= {"order": "*i32", "work": "*i32", "near_rows": "*i32", "scale": "fp32", "cap": "fp32"}
    for name in ("lse_ptr", "carry_ptr", "carry_lse_ptr", "sinks_ptr"):
        types[name] = "*fp32"
    types["v_scale"] = types["v_zero"] = "*fp16"
    fixed = {
        "G": 4, "D": head_dim, "DV": head_dim, "BM": tile.rows, "BN": tile.keys,
        "DP": head_dim, "DVP": head_dim,
        "STAGES": tile.stages, "CAUSAL": True, "WINDOW": False, "BODY": False,
        "SOFTCAP": False, "SINKS": False,
        "CARRY": False, "EXACT": False, "NEAR": False, "SHIFT": 8 if dtype == "fp16" else 0,
        "V_STATIC": False, "V_ZERO": False, "V_GROUPS": 1,
    }  # fmt: skip
    fixed |= flags
    if not fixed["NEAR"]:
        fixed["near_rows"] = None
    if "q_desc" not in types:
        fixed["q_desc"] = None
    signature, constants, aligned = {}, {}, {}
    for at, name in enumerate(prefill_kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
            constants[(at,)] = fixed[name]
            continue
        signature[name] = types.get(name, "i32")
        if signature[name].startswith("*") or name in ("q_heads", "q_token", "q_head"):
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(prefill_kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


PAGES = {
    "int8 sm_90": {},
    "fp8 sm_90": {"code": "fp8"},
    "int4 sm_90": {"code": "int4"},
    "workspace sm_90": {"code": "none"},
    "exact pages sm_90": {"code": "bfloat16", "segment": SEGMENTS["exact"]},
    "int8 sm_80": {"capability": 80},
    "int8 sm_100": {"capability": 100},
    "int8 sm_89": {"capability": 89},
    "workspace sm_89": {"code": "none", "capability": 89},
    "workspace 256 sm_120": {"code": "none", "capability": 120, "head_dim": 256},
    "float32 sm_89": {"code": "float32", "capability": 89},
    "bfloat16 keys, int4 values sm_90": {"code": "bfloat16", "value": "int4"},
    "int4 keys, bfloat16 values sm_90": {"code": "int4", "value": "bfloat16"},
    **{
        f"{code} sm_{target}": {"code": code, "capability": target}
        for code in ("int6", "int3")
        for target in SHARED
    },
    "int6 keys, int4 values sm_90": {"code": "int6", "value": "int4"},
    # Blocks of channels that are no power of two take another way to the copy to shared memory.
    **{
        f"{code} {width} sm_90": {"code": code, "head_dim": width}
        for code, width in (("int6", 48), ("int6", 80), ("int3", 96))
    },
    "float32 256 sm_90": {"code": "float32", "head_dim": 256},
}
DENSE = {
    "dense 128": {},
    "dense 64": {"head_dim": 64},
    "dense 256": {"head_dim": 256},
    "dense window, sinks": {"WINDOW": True, "SINKS": True},
    "dense carried": {"CARRY": True},
    "dense exact": {"EXACT": True, "NEAR": True},
    "dense exact, carried": {"EXACT": True, "CARRY": True},
    "dense exact, window, sinks": {"EXACT": True, "NEAR": True, "WINDOW": True, "SINKS": True},
    "dense exact 256": {"EXACT": True, "NEAR": True, "head_dim": 256},
    "dense group 7": {"G": 7},
    "dense given scales": {"SINKS": True, "V_STATIC": True, "V_ZERO": True, "V_GROUPS": 128},
    # As launched where nobody reads the log-sum-exp: what is not there is None.
    "dense, output alone": dict.fromkeys(
        ("lse_ptr", "carry_ptr", "carry_lse_ptr", "sinks_ptr", "v_scale", "v_zero")
    ),
}


def main() -> None:
    found = {}
    for name, given in PAGES.items():
        arguments, warps = pages_arguments(**given)
        capability = given.get("capability", 90)
        found[name] = compile_kernel(prefill_pages_kernel, arguments, capability, num_warps=warps)
    for name, given in DENSE.items():
        found[name] = compile_dense(**given)
    made = {name: _plain(resources(k)) for name, k in found.items()}
    for name, given in PAGES.items():
        made[name]["limit"] = SHARED[given.get("capability", 90)]
    print(json.dumps(made))


def _plain(found) -> dict:
    """A JSON object of it: counters are not."""
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return values | {"counts": dict(found.counts)}


if __name__ == "__main__":
    main()
