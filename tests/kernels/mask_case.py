"""Mask kernels as ahead-of-time compile cases; run as a program it prints their resources."""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quantpage.ops.attend.flash.tiles import hopper_tile, portable_tile
from quantpage.ops.attend.interval.gluon_kernel import mask_kernel
from quantpage.ops.attend.interval.triton_kernel import flash_mask_kernel
from quantpage.ops.attend.interval.triton_plan import _order_kernel
from tests.kernels.aot import compile_kernel, resources

FORMS = {
    "causal 1": {"VECTORS": 1, "CAUSAL": True, "RANGES": 0},
    "causal 2": {"VECTORS": 2, "CAUSAL": True, "RANGES": 0},
    "both 2": {"VECTORS": 2, "CAUSAL": False, "RANGES": 0},
    "both 4": {"VECTORS": 4, "CAUSAL": False, "RANGES": 0},
    "rows 1": {"VECTORS": 0, "CAUSAL": False, "RANGES": 1},
}
POINTERS = {"order", "work", "tiles", "counts", "mask_ptr", "mask", "spans", "items", "page_table",
            "query_starts", "context_lens"}  # fmt: skip


def compile_dense(head_dim=128, group=4, **form):
    """The Hopper kernel over a float16 workspace."""
    tile = hopper_tile(head_dim, head_dim)
    layout = gl.NVMMASharedLayout.get_default_for([tile.keys, head_dim], gl.float16)
    rows = f"tensordesc<fp16[{tile.keys}, {head_dim}],{layout!r}>"
    types = {"k_desc": rows, "v_desc": rows, "q_ptr": "*bf16", "out_ptr": "*bf16",
             "lse_ptr": "*fp32", "sinks_ptr": "*fp32", "scale": "fp32", "cap": "fp32",
             "v_scale": "*fp16", "v_zero": "*fp16"}  # fmt: skip
    fixed = {
        "G": group, "D": head_dim, "DV": head_dim, "BM": tile.rows, "BN": tile.keys,
        "DP": head_dim, "DVP": head_dim, "STAGES": tile.stages, "PER_HEAD": False, "SHARED": True,
        "BODY": False, "SOFTCAP": False, "SINKS": False, "SHIFT": 8, "V_STATIC": False,
        "V_ZERO": False, "V_GROUPS": 1,
    } | form  # fmt: skip
    signature, constants, aligned = {}, {}, {}
    for at, name in enumerate(mask_kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
            constants[(at,)] = fixed[name]
            continue
        signature[name] = types.get(name, "*i32" if name in POINTERS - {"items"} else "i32")
        if signature[name][0] == "*" or name in ("q_token", "q_head"):
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(
        fn=mask_kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def compile_pages(rows, form, head_dim=128, page=64):
    """The portable kernel over int8 pages."""
    tile, warps = portable_tile(head_dim, rows, 2, 0)
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "lse_ptr": "*fp32", "sinks_ptr": "*fp32",
             "scale": "fp32", "cap": "fp32"}  # fmt: skip
    for side in "kv":
        types[f"{side}_codes"] = "*i8"
        types[f"{side}_scale"] = types[f"{side}_zero"] = "*fp16"
    for name in ("kv_heads", "splits", "part", "width", "m_batch", "m_head", "capacity"):
        types[name] = "i32"
    for name in flash_mask_kernel.arg_names:
        if name in POINTERS:
            types[name] = "*i32"
        elif name not in types and name[0].islower():
            types[name] = "i32:16"
    fixed = {
        "G": 4, "D": head_dim, "DV": head_dim, "DP": head_dim, "DVP": head_dim, "BM": tile.rows,
        "BN": tile.keys, "PAGE": page, "K_CODE": 1, "V_CODE": 1, "K_SCALED": 1, "V_SCALED": 1,
        "K_ZERO": False, "V_ZERO": False, "K_GROUPS": 1, "V_GROUPS": 1, "PER_HEAD": False,
        "SHARED": True, "SEGMENT": 0, "SOFTCAP": False, "SINKS": False, "SHIFT": 8, "OLD": False,
        "STAGES": tile.stages, "OPERAND": tl.float16,
    } | form  # fmt: skip
    return compile_kernel(flash_mask_kernel, types | fixed, 90, num_warps=warps)


def main() -> None:
    """Compile every case."""
    made = {f"dense {name}": compile_dense(**form) for name, form in FORMS.items()}
    made["dense causal 1, group 1"] = compile_dense(group=1, **FORMS["causal 1"])
    given = {"SINKS": True, "V_STATIC": True, "V_ZERO": True, "V_GROUPS": 128}
    made["dense causal 1, given scales"] = compile_dense(**FORMS["causal 1"], **given)
    made["dense causal 1, 256"] = compile_dense(head_dim=256, **FORMS["causal 1"])
    made["pages both 4"] = compile_pages(512, FORMS["both 4"])
    made["pages rows 1, decode"] = compile_pages(4, FORMS["rows 1"])
    order = {"counts": "*i32", "order": "*i32", "items": "i32", "heads": "i32", "TILE": 64}
    made["order"] = compile_kernel(_order_kernel, order, 90, num_warps=4)
    made["dense causal 1, output alone"] = compile_dense(
        **FORMS["causal 1"], **dict.fromkeys(("lse_ptr", "sinks_ptr", "v_scale", "v_zero"))
    )
    made["pages causal 1, output alone"] = compile_pages(
        512, FORMS["causal 1"] | dict.fromkeys(("lse_ptr", "sinks_ptr"))
    )
    found = {}
    for name, compiled in made.items():
        each = resources(compiled)
        found[name] = {
            "stack": each.stack,
            "shared": each.shared,
            "counts": dict(each.counts),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
