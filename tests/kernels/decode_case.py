"""Decode kernels as ahead-of-time compile cases."""

from quantpage.ops.attend.triton_decode_kernel import decode_kernel

CODE = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}


def decode_arguments(key="int8", value="int8", head_dim=128, group=4, page=64, tile=64, rows=8,
                     stages=5, scales=1, zero=(False, False), capability=90, window=False,
                     segment=0, sinks=False, softcap=False):  # fmt: skip
    types = {}
    for name in ("q", "out"):
        types[name] = "*bf16"
    for side, code in (("k", key), ("v", value)):
        types[f"{side}_codes"] = "*bf16" if code == "none" else "*i32"
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
        "K_CODE": CODE[key], "V_CODE": CODE[value],
        "K_SCALES": scales if key != "none" else 0, "V_SCALES": scales if value != "none" else 0,
        "K_ZERO": zero[0], "V_ZERO": zero[1], "K_SHARED": 1, "V_SHARED": 1, "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim, "GROUP": group, "PAGE": page, "ROWS": rows, "ROW_TILES": 1, "TILE": tile, "FULL": False,
        "WINDOW": window, "SEGMENT": segment, "SOFTCAP": softcap, "SINKS": sinks, "CHUNK": 128, "STAGES": stages,
        "OLD": capability < 89, "PAIRS": True, "OVERLAP": capability >= 90,
    }  # fmt: skip
    return types | fixed


def packed_bytes(key: str, value: str, head_dim: int, tile: int) -> float:
    """Bytes of codes and 16-bit scales of one tile."""
    size = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
    return tile * head_dim * (size[key] + size[value])
