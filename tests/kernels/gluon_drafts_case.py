"""The Hopper kernels of many query rows as ahead-of-time compile cases; printed as JSON."""

import dataclasses
import json

from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_drafts import drafts_kernel
from quantpage.ops.attend.decode.gluon_exact import exact_kernel
from quantpage.ops.operand import A_TOKEN
from tests.kernels.aot import compile_kernel, resources
from tests.kernels.decode_case import decode_arguments

ROWS = {"int8": ("i8", 128), "fp8": ("u8", 128), "int4": ("u8", 64)}
LOADED = {"i8": gl.int8, "u8": gl.uint8, "fp16": gl.float16, "bf16": gl.bfloat16}


def copied_type(number: str, *row: int) -> str:
    """Of pages as TMA descriptors, 64 keys at a time."""
    block = [1, 1, 64, *row]
    layout = gl.NVMMASharedLayout.get_default_for(block, LOADED[number])
    return f"tensordesc<{number}{block},{layout!r}>"


def compile_drafts(key="int8", value=None, rows=64, chunk=32, page=64, **given):
    """The kernel for sm_90; ``given`` as in decode_case.decode_arguments."""
    value = value or key
    arguments = decode_arguments(key, value, rows=rows, page=page, **given) | {"CHUNK": chunk}
    arguments |= {"k_pages": copied_type(*ROWS[key]), "v_pages": copied_type(*ROWS[value])}
    if arguments["K_SCALES"] == A_TOKEN:
        arguments["k_scale"] = arguments["v_scale"] = copied_type("fp16")
        for half, has in zip("kv", given.get("zero", (False, False)), strict=True):
            if has:
                arguments[f"{half}_zero"] = copied_type("fp16")
    return compile_kernel(drafts_kernel, arguments, 90, num_warps=4, maxnreg=128)


def compile_exact(number="bf16", **given):
    """The kernel over exact pages, of bfloat16 or float16, as the planner launches it."""
    arguments = decode_arguments("none", "none", rows=64, segment=2, stages=3, **given)
    arguments |= {"CHUNK": 32, "BESIDE": True, "out": "*fp32"}
    arguments |= dict.fromkeys(("k_pages", "v_pages"), copied_type(number, 128))
    return compile_kernel(exact_kernel, arguments, 90, num_warps=4, maxnreg=None)


EXACT_CASES = {
    "exact": {},
    "exact of float16, window": {"number": "fp16", "window": True, "softcap": True, "page": 128},
}
CASES = {
    "int8": {"stages": 3},
    "int8, values of fp8": {"value": "fp8", "stages": 3},
    "int4": {"key": "int4", "stages": 5, "zero": (True, True), "segment": 1, "pieces": True},
    "k8v4": {
        "value": "int4", "stages": 4, "zero": (False, True), "segment": 1, "pieces": True,
    },
    "int4 of 32 rows": {
        "key": "int4", "rows": 32, "stages": 5, "zero": (True, True), "segment": 1, "pieces": True,
    },
    "int8, scales given": {"stages": 3, "scales": 2, "zero": (True, True), "lse": False},
    "int8, window": {"stages": 3, "page": 128, "window": True, "sinks": True},
}  # fmt: skip


def main() -> None:
    found = {}
    for name, given in (CASES | EXACT_CASES).items():
        takes = resources((compile_drafts if name in CASES else compile_exact)(**given))
        values = {f.name: getattr(takes, f.name) for f in dataclasses.fields(takes)}
        found[name] = values | {"counts": dict(takes.counts)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
