"""Decode kernels as ahead-of-time compile cases."""

import json
import sys

from quantpage.formats import CODES, FORMATS
from quantpage.ops.attend.decode.launch import decode_tiles, fitted
from quantpage.ops.attend.decode.triton_kernel import decode_kernel
from quantpage.ops.operand import CODE_KINDS
from tests.kernels.aot import SHARED, compile_kernel, resources

UNITS = {"none": "*bf16", "int6": "*i16", "int3": "*i16"}
"""What codes are read in, where it is no word of 32 bits."""
OTHER_TARGETS = (89, 120)
"""Of codes in planes, which are compiled for every target."""

SHAPES = {"int8": (32, 1, 5), "fp8": (32, 1, 5), "int4": (64, 1, 5), "none": (64, 4, 4)}
SHAPES |= {"int6": (64, 1, 4), "int3": (64, 1, 4)}
"""Tile, warps and stages by codes."""


def decode_arguments(key="int8", value="int8", head_dim=128, group=4, page=64, tile=64, rows=8,
                     stages=5, scales=1, zero=(False, False), capability=90, window=False,
                     segment=0, sinks=False, softcap=False, lse=True, pieces=False, whole=False,
                     gather=16):  # fmt: skip
    types = {}
    for name in ("q", "out"):
        types[name] = "*bf16"
    for side, code in (("k", key), ("v", value)):
        types[f"{side}_codes"] = UNITS.get(code, "*i32")
        types[f"{side}_scale"] = types[f"{side}_zero"] = "*fp16"
    for name in ("page_table", "query_starts", "context_lens", "cuts"):
        types[name] = "*i32"
    for name in ("sinks", "lse", "part_out", "part_lse"):
        types[name] = "*fp32"
    for name in ("softmax_scale", "softcap"):
        types[name] = "fp32"
    for name in ("requests", "kv_heads", "min_tiles", "window", "sink_tokens", "table_row"):
        types[name] = "i32"
    for name in decode_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    fixed = {
        "K_CODE": CODE_KINDS[key], "V_CODE": CODE_KINDS[value],
        "K_SCALES": scales if key != "none" else 0, "V_SCALES": scales if value != "none" else 0,
        "K_ZERO": zero[0], "V_ZERO": zero[1], "K_SHARED": 1, "V_SHARED": 1, "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim, "GROUP": group, "PAGE": page, "ROWS": rows, "ROW_TILES": 1,
        "TILE": tile, "FULL": False, "WINDOW": window, "SEGMENT": segment, "SOFTCAP": softcap,
        "SINKS": sinks, "PIECES": pieces, "BESIDE": whole and capability >= 90, "CHUNK": 128,
        "STAGES": stages, "OLD": capability < 89, "PAIRS": True, "OVERLAP": capability >= 90,
        "GATHER": 0 if whole else gather, "WHOLE": whole, "HIDES": False,
    }  # fmt: skip
    return types | fixed | ({} if lse else {"lse": None})


def packed_bytes(key: str, value: str, head_dim: int, tile: int) -> float:
    """Bytes of codes and 16-bit scales of one tile."""
    return tile * head_dim * (CODES[key].bits + CODES[value].bits) / 8


def float32_case(capability: int, head_dim: int):
    """Exact pages of float32 under 64 query rows, as the planner fits them: kernel, arguments."""
    none = FORMATS["none"].key
    wanted = decode_tiles(none, none, head_dim, 64, 10**6)
    tiles = fitted(wanted, 64, head_dim, 4, SHARED[capability])
    given = decode_arguments(
        "none", "none", head_dim=head_dim, rows=64, tile=tiles.tile, stages=tiles.stages,
        capability=capability, segment=2, page=16,
    )  # fmt: skip
    given |= dict.fromkeys(("q", "out", "k_codes", "v_codes"), "*fp32")
    return compile_kernel(decode_kernel, given, capability, num_warps=tiles.warps)


def write_arguments(code=1, block=128, zero=False, mapped=0, head_dim=128, near=None):
    """near: the code of near pages; None: there are none."""
    from quantpage.ops.rope_write.triton_kernel import Pages
    from quantpage.ops.rope_write.triton_kernel import write_kernel as kernel

    types = dict.fromkeys(
        ("q", "k", "v", "q_out", "k_seen", "v_seen", "q_weight", "k_weight", "q_bias", "k_bias",
         "v_bias"), "*bf16",
    )  # fmt: skip
    codes = "*bf16" if code == 0 else "*i8" if code == CODE_KINDS["int8"] else "*u8"
    pages = Pages(codes, "*fp16", "*fp16", "*bf16", *["i32:16"] * 6)
    types |= {"k_pages": pages, "v_pages": pages}
    types |= dict.fromkeys(("slots", "exact_slots", "positions"), "*i64")
    types |= dict.fromkeys(("cos", "sin", "map_scale", "map_undone", "map_mean"), "*fp32")
    types |= dict.fromkeys(("tokens", "q_heads", "kv_heads"), "i32")
    types["eps"] = "fp32"
    types |= dict.fromkeys(
        ("k_near", "v_near"),
        None if near is None else Pages("*i8", "*fp16", "*fp16", "*i8", *["i32:16"] * 6),
    )
    for name in kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    fixed = {
        "HEAD_DIM": head_dim, "PIECE": 32, "VALUE_DIM": head_dim, "V_PIECE": 32, "ROTARY": head_dim,
        "INTERLEAVED": False, "NORM": 0, "BIAS": False, "MAPPED": mapped,
        "PAGE": 64, "EXACT": near is not None, "RETURN": False, "ROWS": 8, "HARDWARE": True,
        "HEADS": 8, "TILES": 2, "HEADS_FIRST": True, "OVERLAP": True, "KEYS": True, "MADE": False,
        "PRODUCTS": block > 1, "V_PRODUCTS": block > 1,
    }  # fmt: skip
    for side in "KV":
        fixed |= {
            f"{side}_CODE": code, f"{side}_SCALES": 1, f"{side}_ZERO": zero,
            f"{side}_SHARED": head_dim, f"{side}_LIMIT": 65504.0, f"{side}_BLOCK": block,
            f"{side}_NEAR_CODE": near, f"{side}_NEAR_ZERO": False,
            f"{side}_NEAR_SHARED": head_dim, f"{side}_NEAR_LIMIT": 65504.0,
        }  # fmt: skip
    return kernel, types | fixed


def summary(kernel, arguments, capability: int, warps: int, code_bytes: float = 0.0) -> dict:
    """What the tests ask, as plain numbers."""
    found = resources(compile_kernel(kernel, arguments, capability, num_warps=warps))
    registers = -(-found.registers // 8) * 8
    copies = found.in_loop(r"LDGSTS\.E\.BYPASS\.128")
    return {
        "spills": found.in_loop("LDL|STL") if code_bytes else found.find("LDL|STL"),
        "stack": found.stack,
        "byte_loads": found.find(r"LDS\.[US]8"),
        "wide_copies": copies,
        # Scales and page ids are words; codes never are.
        "narrow_code_copies": max(0, found.in_loop(r"LDGSTS\.E$") - 12),
        "products": found.find("HMMA|HGMMA|UTCHMMA"),
        "slow_conversions": found.in_loop(r"I2F\.|F2F\."),
        "instructions_a_byte": len(found.loop) * warps / code_bytes if code_bytes else 0.0,
        "programs": min(65536 // (registers * 32 * warps), 232448 // (found.shared + 1024)),
    }


def main() -> None:
    found = {}
    for part in sys.argv[1].split():
        if part == "others":
            for code in CODE_KINDS.values():
                found[f"write {code}"] = summary(
                    *write_arguments(code, 128 * (code > 0) or 1), 90, 1
                )
            wide = write_arguments(1, 1, mapped=2, head_dim=512)
            found["write int8 512"] = summary(*wide, 90, 4)
            for given in SHARED:
                # The planner's tile for near pages of many requests, and for few tokens.
                for tile, warps in ((32, 1), (64, 4)):
                    near = decode_arguments(tile=tile, segment=2, whole=True, capability=given)
                    found[f"decode near int8 {tile} {given}"] = summary(
                        decode_kernel, near, given, warps
                    )
            # Bodies of int4 and of k8v4, of which every row leaves a piece beside exact pages.
            for key, tile in (("int4", 64), ("int8", 32)):
                body = decode_arguments(
                    key, "int4", tile=tile, segment=1, pieces=True, gather=0,
                    zero=(key == "int4", True),
                )  # fmt: skip
                found[f"decode {key} and exact pages"] = summary(
                    decode_kernel, body, 90, 1, packed_bytes(key, "int4", 128, tile)
                )
            for given, head_dim in ((90, 128), (90, 256), (89, 256)):
                takes = resources(float32_case(given, head_dim))
                found[f"decode float32 {head_dim} {given}"] = {
                    "shared": takes.shared, "limit": SHARED[given]
                }  # fmt: skip
            for target in OTHER_TARGETS:
                found |= decode_cases(target, {c: SHAPES[c] for c in SHAPES if CODES[c].fields})
            continue
        found |= decode_cases(int(part), SHAPES)
    print(json.dumps(found))


def decode_cases(capability: int, shapes: dict[str, tuple[int, int, int]]) -> dict:
    """shapes: code -> tile, warps, stages."""
    found = {}
    for code, (tile, warps, stages) in shapes.items():
        given = decode_arguments(
            code, code, tile=tile, stages=stages, zero=(CODES[code].bits < 8,) * 2,
            capability=capability,
        )  # fmt: skip
        size = packed_bytes(code, code, 128, tile)
        found[f"decode {code} {capability}"] = summary(
            decode_kernel, given, capability, warps, size
        )
    return found


if __name__ == "__main__":
    main()
