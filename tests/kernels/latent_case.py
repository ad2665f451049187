"""Kernels of latent rows as ahead-of-time compile cases."""

from quantpage.ops.attend.latent.triton_kernel import decode_kernel
from quantpage.ops.operand import CODE_KINDS

STORED = {"none": "*bf16", "int8": "*i8", "fp8": "*u8"}


def decode_arguments(code="int8", rows=64, tile=64, stages=2, heads=128, capability=90, page=64,
                     new=1, window=False, by_keys=False, chunks=4):  # fmt: skip
    types = {"q": "*bf16", "out": "*bf16"}
    stored = "*i32" if by_keys and code != "none" else STORED[code]
    types |= dict.fromkeys(("row_codes", "rotary_codes"), stored)
    types |= dict.fromkeys(("row_scale", "rotary_scale"), "*fp16")
    types |= dict.fromkeys(("page_table", "query_starts", "context_lens", "cuts"), "*i32")
    types |= dict.fromkeys(("sinks", "lse", "part_out", "part_lse"), "*fp32")
    types |= dict.fromkeys(("softmax_scale", "softcap"), "fp32")
    for name in ("requests", "min_tiles", "window", "sink_tokens", "table_row"):
        types[name] = "i32"
    for name in decode_kernel.arg_names:
        if name not in types and name[0].islower():
            types[name] = "i32:16"
    return types | {
        "ROW_CODE": CODE_KINDS[code], "ROTARY_CODE": CODE_KINDS[code], "ROW_DIM": 512,
        "ROTARY_DIM": 64, "ROW_WIDTH": 512, "ROTARY_WIDTH": 64, "HEADS": heads, "PAGE": page,
        "ROWS": rows, "ROW_TILES": -(-heads * new // rows), "TILE": tile, "FULL": False,
        "WINDOW": window, "SOFTCAP": False, "SINKS": False, "CHUNK": 128, "STAGES": stages,
        "PAIRS": True, "HIDES": code == "none" and new > 1, "OLD": capability < 89,
        "BY_KEYS": by_keys, "CHUNKS": chunks, "OVERLAP": capability >= 90,
    }  # fmt: skip
