"""A whole model on the CPU: Transformers' own cache against quantized pages.

    quantpage bench cpu-model --model models/smollm2 --threads 2 \
        --out benchmarks/results/cpu-model-2-threads.csv
    quantpage bench cpu-model --model models/smollm2 --threads 2 --prompts \
        --contexts 1024,4096 --steps 3 --out benchmarks/results/cpu-model-prompts-2-threads.csv

Batch 1. Decode steps: caches are filled with random numbers (a step's time does not depend on
them). Prompts: tokens into an empty cache, the logits of the last one. All runs take turns,
so that a busy machine slows all of them alike (bench/timing).
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantpage.bench.rows import Rows, environment
from quantpage.bench.timing import Clock, Sample, Timing, cpu_clock, sample, timing
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.loading.model import (
    check_format,
    load_model,
    model_shape,
)
from quantpage.integrations.hf_transformers.modules.arguments import cache_as, caches_in
from quantpage.integrations.int8_weights import quantize_weights

Run = tuple[str, str | None, str]
"""What it is called, cache format (None: Transformers' DynamicCache), weights."""
REFERENCE: Run = ("transformers", None, "bf16")
RUNS: tuple[Run, ...] = (
    ("none", "none", "bf16"),
    ("int8", "int8", "bf16"),
    ("int8", "int8", "int8"),
    ("int4", "int4", "int8"),
)
"""Beside the reference, where no formats are asked for."""


class Stepper:
    """One model with one full cache, ready to decode."""

    def __init__(self, model: Any, kv_format: str | None, context: int) -> None:
        self.model = model
        self.token = torch.zeros(1, 1, dtype=torch.int64)
        self.cache: Any
        if kv_format is None:
            # The cache that the model makes for itself, one token in it.
            self.attached, self.cache = None, caches_in(model(self.token, use_cache=True))[0]
        else:
            self.attached = attach(model, kv_format=kv_format)
            self.cache = self.attached.new_cache()
        shape = model_shape(model.config)
        for layer in range(shape.layers):
            rows = torch.randn(2, 1, shape.kv_heads, context, shape.head_dim, dtype=shape.dtype)
            self.cache.update(rows[0], rows[1], layer)
            if kv_format is not None:
                self.cache.layers[layer].flush()

    def step(self) -> None:
        """One more token."""
        out = self.model(self.token, **cache_as(self.model, self.cache), use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)


class Prompt:
    """One model and one prompt, into an empty cache each time."""

    def __init__(self, model: Any, kv_format: str | None, tokens: int) -> None:
        self.model = model
        self.ids = torch.arange(tokens)[None] * 7919 % model.config.vocab_size
        self.attached = None if kv_format is None else attach(model, kv_format=kv_format)
        self.read(self.ids[:, :256])

    def step(self) -> None:
        """The whole prompt."""
        self.read(self.ids)

    def read(self, ids: torch.Tensor) -> None:
        """Tokens into an empty cache."""
        self.model(ids, use_cache=True, logits_to_keep=1)


def measure(
    steps: dict[Any, Callable[[], None]], warmup: int, count: int, clock: Clock
) -> dict[Any, Timing]:
    """Seconds of a step of each, which take turns."""
    samples: dict[Any, list[Sample]] = {key: [] for key in steps}
    for number in range(count + warmup):
        for key, step in steps.items():
            taken = sample(step, clock)
            if number >= warmup:
                samples[key].append(taken)
    return {key: timing(each) for key, each in samples.items()}


def prepare(
    plain: Any, prompts: bool, context: int, runs: Sequence[Run]
) -> dict[tuple[str, str], Any]:
    """What takes its turn, by cache and weights, each with a model of its own."""
    ready: dict[tuple[str, str], Any] = {}
    for name, kv_format, weights in (REFERENCE, *runs):
        model = copy.deepcopy(plain)
        if weights == "int8":
            quantize_weights(model)
        ready[name, weights] = (Prompt if prompts else Stepper)(model, kv_format, context)
    return ready


@torch.inference_mode()
def run(
    model: str,
    out: Path | None,
    threads: int,
    contexts: Sequence[int],
    prompts: bool,
    steps: int,
    formats: Sequence[str] = (),
) -> None:
    """Measure every context and write the CSV; prompts: whole prompts, not decode steps.

    formats: what ``attach`` takes, with the weights as they are; empty: RUNS.
    """
    for each in formats:
        check_format(model, each)
    runs = tuple((each, each, "bf16") for each in formats) or RUNS
    torch.set_num_threads(threads)
    plain, _ = load_model(model, torch.bfloat16)
    clock = cpu_clock()
    kind, warmup = ("prompt", 0) if prompts else ("decode", 2)
    rows = Rows(
        out,
        environment("cpu"),
        **{"context": -7, "cache": 12, "weights": 7, f"{kind}_ms_median": -16},
        **{f"{kind}_ms_best": -14, f"{kind}_tokens_per_s": -19},
        times_transformers=-18,
        undisturbed=-11,
    )
    for context in contexts:
        ready = prepare(plain, prompts, context, runs)
        taken = {key: each.step for key, each in ready.items()}
        measured = measure(taken, warmup, steps, clock)
        tokens = context if prompts else 1
        base = measured["transformers", "bf16"].median
        for (name, weights), (best, median, quiet, _) in measured.items():
            rows.add(
                {
                    "context": context,
                    "cache": name,
                    "weights": weights,
                    "threads": threads,
                    f"{kind}_ms_median": f"{median * 1e3:.2f}",
                    f"{kind}_ms_best": f"{best * 1e3:.2f}",
                    f"{kind}_tokens_per_s": f"{tokens / median:.1f}",
                    "times_transformers": f"{base / median:.2f}",
                    "clock": "cpu" if clock is time.process_time else "wall",
                    "undisturbed": quiet,
                }
            )
