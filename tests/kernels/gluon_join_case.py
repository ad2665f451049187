"""What joins many rows on Hopper as ahead-of-time compile cases; printed as JSON."""

import dataclasses
import json

from quantpage.ops.attend.decode.gluon_join import join_kernel
from quantpage.ops.attend.decode.launch import JOINED_PIECES
from tests.kernels.aot import compile_kernel, resources


def compile_join(sinks=False, turn=0, earlier=True, lse=True, width=128):
    """The kernel for sm_90, four query rows a program."""
    types = dict.fromkeys(("cuts", "query_starts", "context_lens"), "*i32")
    types |= dict.fromkeys(("part_out", "part_lse", "lse", "earlier_out", "earlier_lse"), "*fp32")
    types |= {"out": "*bf16", "sinks": "*fp32"}
    types |= dict.fromkeys(("kv_heads", "row_tiles", "window", "sink_tokens"), "i32")
    types |= dict.fromkeys(("out_token", "out_head"), "i32:16")
    absent = {"sinks": sinks, "lse": lse, "earlier_out": earlier, "earlier_lse": earlier}
    types |= {name: None for name, given in absent.items() if not given}
    fixed = {
        "VALUE_DIM": width, "GROUP": 4, "ROWS": 64, "SINKS": sinks, "PARTS": JOINED_PIECES,
        "PAGE": 64, "FULL": False, "WINDOW": False, "SEGMENT": 1, "OVERLAP": True, "TURN": turn,
    }  # fmt: skip
    return compile_kernel(join_kernel, types | fixed, 90, num_warps=4)


CASES = {
    "codes alone": {"earlier": False, "lse": False},
    "exact pages": {},
    "turned, with sinks": {"sinks": True, "turn": 128},
}


def main() -> None:
    found = {}
    for name, given in CASES.items():
        takes = resources(compile_join(**given))
        values = {f.name: getattr(takes, f.name) for f in dataclasses.fields(takes)}
        found[name] = values | {"counts": dict(takes.counts)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
