"""Whole models: on a GPU, on a CPU, inside vLLM, and what they take in memory."""

from figuring.rows import MISSING, read, table


def gpu_model() -> str:
    """The 8B-shaped model, a row a cache format."""
    rows = read("h200-model.csv")
    base = float(rows[0]["decode_tokens_per_s"])

    def line(row: dict[str, str]) -> list[str]:
        speed = float(row["decode_tokens_per_s"])
        return [
            f"`{row['kv_format']}`",
            f"{float(row['cache_gib']):.1f} GiB",
            f"{float(row['decode_ms']):.2f} ms",
            f"{speed:,.0f} ({speed / base:.2f}x)",
            f"{float(row['prompt_tokens_per_s']):,.0f}",
        ]

    head = ("cache", "size", "decode step", "decode tokens/s", "prompt tokens/s")
    return table(head, map(line, rows))


def cpu_model() -> str:
    """SmolLM2 on two threads, tokens a second, a row a context."""
    rows = read("cpu-model-2-threads.csv")
    kinds = list(dict.fromkeys((row["cache"], row["weights"]) for row in rows))

    def label(cache: str, weights: str) -> str:
        name = "Transformers, bf16 cache" if cache == "transformers" else f"`{cache}`"
        return name if weights == "bf16" else f"{name}, `--weights {weights}`"

    def cell(context: str, kind: tuple[str, str]) -> str:
        for row in rows:
            if (row["context"], row["cache"], row["weights"]) == (context, *kind):
                times = "" if kind[0] == "transformers" else f" ({row['times_transformers']}x)"
                return f"{float(row['decode_tokens_per_s']):.1f}{times}"
        return MISSING

    contexts = dict.fromkeys(row["context"] for row in rows)
    return table(
        ["context", *(label(*kind) for kind in kinds)],
        ([f"{int(c):,}", *(cell(c, kind) for kind in kinds)] for c in contexts),
    )


def memory() -> str:
    rows = read("cpu-memory.csv")
    head = ("model", "tokens", "cache", "held, MiB", "standing, MiB", "of Transformers'")
    columns = ("model", "context", "cache", "held_mib", "standing_mib", "of_transformers")
    return table(
        (*head, "process at most, MiB"),
        ([*(row[name] for name in columns), row["peak_mib"] or MISSING] for row in rows),
    )


def vllm() -> str:
    """A step inside vLLM, 16 requests of 16k tokens: the newest row of each cache."""
    said = {
        "bfloat16": "FlashAttention-3, bf16",
        "fp8": "FlashAttention-3, fp8",
        "quantpage_int8": "`quantpage_int8`",
        "quantpage_fp8": "`quantpage_fp8`",
        "quantpage_k8v4": "`quantpage_k8v4`",
        "quantpage_int4": "`quantpage_int4`",
    }
    shape = {"requests": "16", "context": "16384", "layers": "16"}
    rows = [row for row in read("h100-vllm.csv") if all(row[k] == v for k, v in shape.items())]
    newest = {row["kv_cache_dtype"]: row for row in rows if row["steady_ms"]}

    def line(name: str) -> list[str]:
        row = newest[name]
        return [said[name], f"{row['steady_ms']} ms", f"{int(row['prompt_tokens_per_s']):,}"]

    return table(["cache", "decode step", "prompt tokens/s"], map(line, said))
