"""Kernels of latent rows as ahead-of-time compile cases."""

import json
import sys

from quantpage.ops.attend.latent.launch import MANY, fitted, latent_tiles, shared_bytes
from quantpage.ops.attend.latent.triton_kernel import decode_kernel
from quantpage.ops.gather.triton import tile_of
from quantpage.ops.gather.triton_kernel import gather_kernel
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.rope_write.triton import launch_shape
from tests.kernels.aot import SHARED, compile_kernel, resources
from tests.kernels.decode_case import write_arguments

STORED = {"none": "*bf16", "int8": "*i8", "fp8": "*u8"}
RANK, ROTARY = 512, 64


def decode_arguments(code="int8", rows=64, tile=64, stages=2, heads=128, capability=90, page=64,
                     new=1, window=False, by_keys=False):  # fmt: skip
    types = {"q": "*bf16", "out": "*bf16"}
    stored = "*i32" if by_keys else STORED[code]
    types |= dict.fromkeys(("row_codes", "rotary_codes"), stored)
    types |= dict.fromkeys(("row_scale", "rotary_scale"), "*fp16")
    types |= dict.fromkeys(("page_table", "query_starts", "context_lens", "cuts"), "*i32")
    types |= dict.fromkeys(("sinks", "lse", "part_out", "part_lse"), "*fp32")
    types |= dict.fromkeys(("softmax_scale", "softcap"), "fp32")
    for name in ("requests", "min_tiles", "window", "sink_tokens", "table_row"):
        types[name] = "i32"
    # Triton compiles a 1 in, and takes any other number at run time.
    types["row_tiles"] = 1 if heads * new <= rows else "i32"
    for name in decode_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    return types | {
        "ROW_CODE": CODE_KINDS[code], "ROTARY_CODE": CODE_KINDS[code], "ROW_DIM": RANK,
        "ROTARY_DIM": ROTARY, "ROW_WIDTH": RANK, "ROTARY_WIDTH": ROTARY, "HEADS": heads,
        "PAGE": page, "ROWS": rows, "TILE": tile,
        "FULL": False, "WINDOW": window, "SOFTCAP": False, "SINKS": False, "CHUNK": 128,
        "STAGES": stages, "PAIRS": True, "HIDES": code == "none" and new > 1,
        "OLD": capability < 89, "BY_KEYS": by_keys, "OVERLAP": capability >= 90,
    }  # fmt: skip


def decode_takes(code: str, heads: int, keys: int, capability: int) -> dict:
    """What the planner's shape for this card takes."""
    quantized, itemsize = code != "none", 2 if code == "none" else 1
    tiles = latent_tiles(quantized, heads, keys, (capability // 10, capability % 10))
    tiles = fitted(tiles, RANK + ROTARY, itemsize, SHARED[capability])
    given = decode_arguments(
        code, tiles.rows, tiles.tile, tiles.stages, heads, capability, by_keys=tiles.by_keys
    )
    takes = resources(compile_kernel(decode_kernel, given, capability, num_warps=tiles.warps))
    return {
        "shape": [tiles.rows, tiles.tile, tiles.by_keys],
        "shared": takes.shared,
        "counted": shared_bytes(tiles, RANK + ROTARY, itemsize),
        "limit": SHARED[capability],
        "stack": takes.stack,
        "spills": takes.find("LDL|STL"),
        "products": takes.find("HMMA|HGMMA|UTCHMMA"),
        "slow_conversions": takes.in_loop(r"I2F\.|F2F\."),
        "programs": min(
            65536 // (-(-takes.registers // 8) * 256 * tiles.warps),
            SHARED[capability] // (takes.shared + 1024),
        ),
    }


def write_takes(code: int, tokens: int, capability: int) -> dict:
    """Of the write of a row and its rotary channels."""
    shape = launch_shape(tokens, RANK, 0, 1)
    kernel, given = write_arguments(code)
    scales = 1 if code else 0
    for side, width in (("K", RANK), ("V", ROTARY)):
        given |= {f"{side}_BLOCK": 1, f"{side}_SCALES": scales, f"{side}_SHARED": width}
    given |= {
        "HEAD_DIM": RANK, "VALUE_DIM": ROTARY, "PIECE": shape.piece,
        "V_PIECE": min(ROTARY, shape.piece), "ROTARY": 0, "ROWS": shape.rows,
        "HEADS": shape.heads, "TILES": shape.tiles, "HEADS_FIRST": shape.heads_first,
        "PRODUCTS": False, "V_PRODUCTS": False, "HARDWARE": capability >= 89,
        "OVERLAP": capability >= 90,
    }  # fmt: skip
    takes = resources(compile_kernel(kernel, given, capability, num_warps=shape.warps))
    return {"spills": takes.find("LDL|STL"), "registers": takes.registers}


def gather_takes(code: str, capability: int) -> dict:
    """Of the gather of rows into 16-bit numbers."""
    types = dict.fromkeys(("codes", "codes_too"), STORED[code])
    types |= dict.fromkeys(("scale", "scale_too", "zero", "zero_too"), "*fp16")
    types |= dict.fromkeys(("out", "out_too", "marks"), "*bf16")
    types |= dict.fromkeys(("page_table", "spans"), "*i32")
    types |= dict.fromkeys(("table_row", "first_head", "mark_head", "mark_row"), "i32")
    for name in gather_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    given = types | {
        "CODE": CODE_KINDS[code], "HEAD_DIM": RANK, "WIDTH": RANK, "PAGE": 64, "GROUPS": 1,
        "SCALES": int(code != "none"), "ZERO": False, "LIMIT": 3.3895313892515355e38,
        "TILE": tile_of(RANK), "OLD": capability < 89, "HALVES": 1, "MARKS": False,
    }  # fmt: skip
    takes = resources(compile_kernel(gather_kernel, given, capability, num_warps=4))
    return {"spills": takes.find("LDL|STL"), "registers": takes.registers}


def main() -> None:
    found = {}
    for capability in map(int, sys.argv[1].split()):
        cases = [("int8", 16, 0), ("none", 16, 0)]
        if capability == 90:
            cases += [("int8", 16, MANY + 1), ("int8", 128, 0), ("none", 128, 0), ("fp8", 128, 0)]
        for code, heads, keys in cases:
            found[f"{code} {heads} {keys} {capability}"] = decode_takes(
                code, heads, keys, capability
            )
        for kind in ("none", "int8", "fp8"):
            found[f"gather {kind} {capability}"] = gather_takes(kind, capability)
        for code in (0, 1, 2) if capability == 90 else (1,):
            for tokens in (64, 4096):
                name = f"write {code} {tokens} {capability}"
                found[name] = write_takes(code, tokens, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
