"""The Hopper decode kernel as ahead-of-time compile cases; printed as JSON like prefill_case."""

import dataclasses
import json

from quantpage.ops.attend.decode.gluon_kernel import decode_kernel
from quantpage.ops.attend.decode.triton import KEY_UNITS, VALUE_UNITS
from tests.kernels.aot import compile_kernel, resources
from tests.kernels.decode_case import decode_arguments

TYPES = {"torch.int8": "*i8", "torch.int16": "*i16"}


def compile_decode(code="int8", registers=None, chunk=32, **given):
    """The kernel for sm_90; ``given`` as in decode_case.decode_arguments."""
    arguments = decode_arguments(code, code, **given) | {"CHUNK": chunk}
    for name, units in (("k_codes", KEY_UNITS), ("v_codes", VALUE_UNITS)):
        arguments[name] = TYPES.get(str(units.get(code)), "*i32")
    return compile_kernel(decode_kernel, arguments, 90, num_warps=4, maxnreg=registers)


# The planner's shapes: query rows, stages, cap on registers.
CASES = {
    "int8 token": {"rows": 8, "stages": 4},
    "int8 token, four programs": {"rows": 8, "stages": 3, "registers": 128},
    "fp8 token, four programs": {"code": "fp8", "rows": 8, "stages": 3, "registers": 128},
    "int4 token, three programs": {
        "code": "int4", "rows": 8, "stages": 3, "registers": 168, "zero": (True, True),
    },
    "int4 token and exact pages": {
        "code": "int4", "rows": 8, "stages": 3, "registers": 168, "zero": (True, True),
        "segment": 1, "pieces": True,
    },
    "int8 draft": {"rows": 32, "stages": 4},
    "fp8 draft": {"code": "fp8", "rows": 32, "stages": 4},
    "int4 draft": {"code": "int4", "rows": 32, "stages": 4, "zero": (True, True)},
    "int8 of 256": {"rows": 8, "stages": 2, "head_dim": 256},
    "int8 of small pages, window": {
        "rows": 16, "stages": 4, "page": 16, "window": True, "sinks": True, "softcap": True,
    },
    "int8 token, output alone": {"rows": 8, "stages": 4, "lse": False},
}  # fmt: skip


def main() -> None:
    found = {}
    for name, given in CASES.items():
        takes = resources(compile_decode(**given))
        values = {f.name: getattr(takes, f.name) for f in dataclasses.fields(takes)}
        found[name] = values | {"counts": dict(takes.counts)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
