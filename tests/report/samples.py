"""A report's data, made up: what rules and pages are tried on."""

import base64
import zlib

from quantpage.report.schema import KIND, VERSION

ROWS = {
    # bits, bytes a token, mean KL, share of same top tokens
    "none": (16.0, 23040, 1e-11, 1.0),
    "int8": (8.25, 11880, 1.5e-4, 0.99),
    "fp8": (8.25, 11880, 4.5e-3, 0.95),
    "int4": (4.5, 6480, 2.3e-3, 0.959),
}


def row(name, **changes):
    """One format's figures."""
    bits, size, kl, top1 = ROWS.get(name, (8.0, 10000, 1e-3, 0.98))
    return {
        "format": name,
        "bits": bits,
        "bytes_per_token": size,
        "sixteen_bit_tokens": "0",
        "kl_mean": kl,
        "kl_p99": 10 * kl,
        "kl_max": 100 * kl,
        "top1": top1,
        "top1_error": 0.002,
        "overlap": 0.99,
        "perplexity": 34.3,
        "tokens": 2048,
        **changes,
    }


def report(*rows, yardstick=True, layers=4, heads=2, channels=16):
    """Data in the form that ``check`` accepts."""
    rows = list(rows) or [row(name) for name in ROWS]
    names = [each["format"] for each in rows]
    quantized = [name for name in names if name != "none"]
    errors = {
        name: {
            half: {str(at): [0.01 * (1 + head) for head in range(heads)] for at in range(layers)}
            for half in ("keys", "values")
        }
        for name in quantized
    }
    picture = base64.b64encode(zlib.compress(bytes(3 * 4 * channels // 2))).decode()
    cells = [{"length": 256, "depth": 0.1}, {"length": 512, "depth": 0.1}]
    found = [{"right": True, "probability": 0.5}, {"right": False, "probability": 0.1}]
    low = row("bfloat16", kl_mean=1.6e-3, top1=0.97)
    return {
        "kind": KIND,
        "version": VERSION,
        "made": {
            "model_digest": "m", "text": "t.txt", "text_digest": "t", "dtype": "float32",
            "device": "a CPU", "threads": 1, "quantpage": "0.1.0", "torch": "2",
            "transformers": "5",
            "calibration": "auto", "page_size": 64, "date": "2026-11-27T01:02+00:00",
            "command": "quantpage report --model m --out r.html",
        },
        "model": {
            "name": "m", "type": "llama", "layers": layers, "q_heads": 4, "kv_heads": heads,
            "head_dim": channels,
        },
        "fidelity": {"rows": rows, "yardstick": low if yardstick else None},
        "position": {
            "edges": [64 + 100 * at for at in range(13)],
            "kl": {each["format"]: [each["kl_mean"]] * 12 for each in rows},
        },
        "answers": {
            "steps": 8, "count": 2, "prompt": 128,
            "kl": {name: [1e-3] * 8 for name in names},
            "until": {name: [8, 5] for name in names},
        },
        "needle": {"cells": cells, "found": dict.fromkeys(("unquantized", *names), found)},
        "heads": {
            "tokens": 512,
            "errors": errors,
            "pictures": {
                "tokens": 4,
                "channels": channels,
                "heads": [
                    {
                        "layer": layer, "head": head, "outliers": [[3, 5.5]] if head else [],
                        "map_in_use": False, "largest": [4.0, 2.0, 2.0], "data": picture,
                    }
                    for layer in range(layers)
                    for head in range(heads)
                ],
            },
        },
        "advice": {
            "context": 8192, "tokens": 128, "why": "",
            "curve": [
                {"line": "int4", "bits": 4.8, "loss": 2e-3},
                {"line": "int4,layers=0:int8", "bits": 5.5, "loss": 1e-3},
                {"line": "int8", "bits": 8.3, "loss": 1e-4},
            ],
            "uniform": [
                {"line": "int4", "bits": 4.5, "loss": 2.3e-3},
                {"line": "int8", "bits": 8.25, "loss": 1.5e-4},
            ],
        },
        "speed": {
            "rows": [
                {"format": name, "context": context, "microseconds": 9.0, "bytes": context * 100}
                for name in names
                for context in (512, 2048)
            ],
            "why": "", "gb_per_s": 20.0, "limit": "reading", "device": "a CPU", "threads": 1,
        },
        "memory": {
            "contexts": [1024, 8192],
            "unquantized": [1024 * 23040, 8192 * 23040],
            "free": 1 << 33,
            "rows": [
                {
                    "format": each["format"], "bytes_per_token": each["bytes_per_token"],
                    "request_bytes": [n * each["bytes_per_token"] for n in (1024, 8192)],
                    "longest": 100000,
                }
                for each in rows
            ],
        },
        "served": {
            "choices": [{"format": name, "op": "attend decode", "chosen": "cpu"} for name in names],
            "refused": [
                {"sentence": "Triton needs a <GPU>.", "cases": [[["triton"], ["decode"], ["int8"]]]}
            ],
        },
    }  # fmt: skip
