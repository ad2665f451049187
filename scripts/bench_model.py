"""A whole model on a GPU: decode tokens per second through each cache format, as CUDA graphs.

An 8B-shaped Llama with random weights (32 layers, 32 query heads, 8 kv_heads, head_dim 128); every
format in one process, the prompt's pages filled by a prefill in chunks.

usage: python scripts/bench_model.py [--batch 16] [--context 16384] [--csv FILE]
"""

import argparse
import csv
import statistics
import subprocess
from pathlib import Path

import torch
import transformers

import quantpage
from quantpage.integrations.hf_transformers.graph import DecodeGraph


def build(layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        initializer_range=0.02,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).eval()


def prefilled(model, attached, batch: int, context: int, chunk: int):
    """A cache that holds ``context`` random tokens a row; prefilled in chunks."""
    cache = attached.new_cache()
    noise = torch.Generator(device="cuda").manual_seed(0)
    rows = max(1, chunk // batch)
    done = 0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    while done < context:
        now = min(rows, context - done)
        ids = torch.randint(0, 128000, (batch, now), generator=noise, device="cuda")
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        done += now
    end.record()
    end.synchronize()
    return cache, out.logits[:, -1].argmax(-1), batch * context / start.elapsed_time(end) * 1e3


def measure(model, kv_format: str, arguments) -> dict:
    with quantpage.attach(model, kv_format=kv_format, page_size=64) as attached:
        cache, last, prefill = prefilled(
            model, attached, arguments.batch, arguments.context, arguments.chunk
        )
        graph = DecodeGraph(model, cache, last, arguments.steps + 8)
        graph.run(8)
        times = []
        for _ in range(4):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.run(arguments.steps // 4)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / (arguments.steps // 4))
        used = cache.used_bytes()
        del graph, cache
    step = statistics.median(times)
    return {
        "kv_format": kv_format,
        "batch": arguments.batch,
        "context": arguments.context,
        "layers": arguments.layers,
        "prefill_tokens_per_s": round(prefill, 1),
        "decode_ms": round(step, 3),
        "decode_tokens_per_s": round(arguments.batch / step * 1e3, 1),
        "cache_gib": round(used / 2**30, 3),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=16384, help="prefill tokens a forward")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--formats", default="none,int8,fp8,int4")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit", default="", help="where git is not at hand")
    arguments = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    model = build(arguments.layers)
    rows = []
    for name in arguments.formats.split(","):
        row = measure(model, name, arguments)
        torch.cuda.empty_cache()
        row |= {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": arguments.commit or head.stdout.strip(),
        }
        rows.append(row)
        print(row, flush=True)
        if arguments.csv:
            with arguments.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
