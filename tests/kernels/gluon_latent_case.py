"""The Hopper kernel of latent rows as ahead-of-time compile cases, in the planner's shapes."""

import dataclasses
import json

from quantpage.hardware import HOPPER
from quantpage.ops.attend.latent.gluon_kernel import attend_kernel
from quantpage.ops.attend.latent.launch import LONG, latent_tiles
from quantpage.ops.operand import CODE_KINDS
from tests.kernels.aot import compile_kernel, resources
from tests.kernels.latent_case import decode_arguments


def compile_latent(code="int8", heads=16, keys=1, **given):
    """The planner's shape for these heads of one token; ``given`` replaces arguments."""
    tiles = latent_tiles(True, heads, keys, HOPPER, True)
    arguments = decode_arguments(code, tiles.rows, tiles.tile, tiles.stages, heads)
    planned = {"hints": "*i32", "pages": "i32", "counters": None, "pieces": None, "starts": None}
    words = planned | {"row_codes": "*i32", "rotary_codes": "*i32", "CODE": CODE_KINDS[code]}
    return compile_kernel(attend_kernel, arguments | words | given, 90, num_warps=tiles.warps)


CASES = {
    "int8 16": {},
    "fp8 16": {"code": "fp8"},
    "int8 16 of many keys": {"keys": LONG + 1},
    "fp8 16 of many keys": {"code": "fp8", "keys": LONG + 1},
    "int8 32": {"heads": 32},
    "int8 128": {"heads": 128},
    "fp8 128": {"code": "fp8", "heads": 128},
    "int8 16 joined": {"counters": "*i32"},
    "int8 128 of prompts": {"heads": 128, "pieces": "*i32", "starts": "*i32"},
    "int8 16 of small pages, window": {
        "PAGE": 16, "WINDOW": True, "SINKS": True, "SOFTCAP": True, "lse": None
    },
}  # fmt: skip


def main() -> None:
    found = {}
    for name, given in CASES.items():
        takes = resources(compile_latent(**given))
        values = {f.name: getattr(takes, f.name) for f in dataclasses.fields(takes)}
        found[name] = values | {"counts": dict(takes.counts)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
