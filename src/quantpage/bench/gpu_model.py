"""A whole model's steps on a GPU: decode through each cache format, every step one CUDA graph.

    quantpage bench gpu-model --batch 16 --context 16384 --out rows.csv

An 8B-shaped Llama with random weights (32 layers, 32 query heads on 8 kv_heads of 128); all formats
in one process. Caches are filled with random numbers (a step's time does not depend on them). The
prompt's speed is that of one row's prompt of ``--context`` tokens, the second time it is run.
"""

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from quantpage.bench.rows import Rows, environment
from quantpage.bench.timing import milliseconds
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.loading.model import model_shape
from quantpage.integrations.hf_transformers.steps.graph import DecodeGraph

DTYPE = torch.bfloat16
ROUNDS = 4


def build(layers: int) -> Any:
    """The model, random, in bfloat16 on the GPU."""
    config: Any = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.02,
    )
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).eval()


def filled_cache(model: Any, attached: Any, batch: int, context: int) -> Any:
    """A cache that holds ``context`` random tokens a row and one that a step wrote: the step gives
    back what the last layer worked in."""
    shape, cache = model_shape(model.config), attached.new_cache()
    for layer in range(shape.layers):
        size = (batch, shape.kv_heads, context, shape.head_dim)
        k, v = (torch.randn(size, dtype=DTYPE, device="cuda") for _ in range(2))
        cache.update(k, v, layer)
        cache.layers[layer].flush()
    model(torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), past_key_values=cache)
    return cache


def prompt_speed(model: Any, attached: Any, context: int) -> float:
    """Tokens a second of one row's prompt; the first run compiles and is not counted."""
    ids = torch.randint(0, 128000, (1, context), device="cuda")
    times = [
        milliseconds(lambda: model(ids, past_key_values=attached.new_cache(), logits_to_keep=1))
        for _ in range(3)
    ]
    return context / min(times[1:]) * 1e3


def profile(graph: DecodeGraph, steps: int) -> None:
    """Print where a step's time goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        graph.run(steps)
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in record.events():
        spent[event.name] += event.device_time
        calls[event.name] += 1
    for name, total in spent.most_common(24):
        print(f"    {total / steps:9.1f} us  {calls[name] / steps:5.0f} x  {name[:100]}")


@dataclass(frozen=True, slots=True)
class GpuModelRequest:
    """What the flags of `quantpage bench gpu-model` say."""

    batch: int = 16
    context: int = 16384
    layers: int = 32
    steps: int = 16
    """Decode steps a round."""
    formats: tuple[str, ...] = ("none", "int8", "fp8", "k8v4", "int4")
    profile: bool = False
    """List the kernels of a step."""
    out: Path | None = None
    commit: str = ""
    """Of the rows, where git is not at hand."""


def measure(model: Any, kv_format: str, given: GpuModelRequest) -> dict[str, object]:
    """One row of the CSV."""
    new = 1 + 8 + ROUNDS * given.steps + 4
    longest = given.context + 1 + new  # the step that filled_cache ends with
    with attach(model, kv_format=kv_format, page_size=64, max_tokens=longest) as attached:
        prompt = prompt_speed(model, attached, given.context)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache = filled_cache(model, attached, given.batch, given.context)
        stands, promised = torch.cuda.memory_allocated() - before, cache.allocated_bytes()
        first = torch.zeros(given.batch, dtype=torch.int64, device="cuda")
        graph = DecodeGraph(model, cache, first, new)
        graph.run(8)
        times = [milliseconds(lambda: graph.run(given.steps)) for _ in range(ROUNDS)]
        if given.profile:
            profile(graph, 4)
        peak = torch.cuda.max_memory_allocated() - before
    step = statistics.median(times) / given.steps
    return {
        "kv_format": kv_format,
        "batch": given.batch,
        "context": given.context,
        "layers": given.layers,
        "prompt_tokens_per_s": round(prompt, 1),
        "decode_ms": round(step, 3),
        "decode_tokens_per_s": round(given.batch / step * 1e3, 1),
        "cache_gib": round(promised / 2**30, 3),
        "allocator_cache_gib": round(stands / 2**30, 3),
        "allocator_peak_gib": round(peak / 2**30, 3),
        "transformers": transformers.__version__,
    }


@torch.inference_mode()
def run(given: GpuModelRequest) -> None:
    """Measure every format and write the CSV."""
    model = build(given.layers)
    rows = Rows(
        given.out, environment("cuda", given.commit), kv_format=10, batch=-5, context=-7,
        prompt_tokens_per_s=-19, decode_ms=-9, decode_tokens_per_s=-19, cache_gib=-9,
        allocator_peak_gib=-18,
    )  # fmt: skip
    for name in given.formats:
        rows.add(measure(model, name, given))
        torch.cuda.empty_cache()
