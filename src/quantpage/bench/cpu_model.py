"""A whole model's decode steps on the CPU: Transformers' own cache against quantized pages.

    python -m quantpage.bench.cpu_model --model models/smollm2 --threads 2 \
        --out benchmarks/results/cpu-model.csv

Random tokens, batch 1, greedy. The prompt is read in chunks, as an engine would. All caches of one
context are filled first and then step in turn, so that a busy machine slows all of them alike. The
best and the median step are written; samples with an involuntary context switch are dropped.
"""

import argparse
import copy
import csv
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantpage.hardware import device_info
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.model import load_model
from quantpage.integrations.int8_weights import quantize_weights

RUNS = (
    ("transformers", None, "bf16"),
    ("none", "none", "bf16"),
    ("int8", "int8", "bf16"),
    ("int8", "int8", "int8"),
    ("int4", "int4", "int8"),
)
"""What it is called, cache format (None: Transformers' DynamicCache), weights."""


class Stepper:
    """One model with one cache, ready to decode."""

    def __init__(self, model: Any, kv_format: str | None, prompt: torch.Tensor) -> None:
        self.model = model
        self.attached = None if kv_format is None else attach(model, kv_format=kv_format)
        start = time.perf_counter()
        self.cache, logits = None, None
        for chunk in prompt.split(1024, dim=1):
            out = model(chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache, logits = out.past_key_values, out.logits
        self.prefill = time.perf_counter() - start
        assert logits is not None
        self.token = logits[:, -1:].argmax(-1)

    def step(self) -> None:
        """One more token."""
        out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)


def measure(steps: dict[Any, Callable[[], None]], count: int) -> dict[Any, tuple]:
    """(best, median milliseconds, undisturbed samples), in turn."""
    samples: dict[Any, list[tuple[float, int]]] = {key: [] for key in steps}
    for number in range(count + 2):
        for key, step in steps.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = time.perf_counter()
            step()
            taken = (time.perf_counter() - start) * 1e3
            lost = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
            if number >= 2:
                samples[key].append((taken, lost))
    answer = {}
    for key, found in samples.items():
        quiet = [taken for taken, lost in found if lost == 0]
        kept = quiet if len(quiet) >= 3 else sorted(taken for taken, _ in found)[:3]
        answer[key] = (min(kept), statistics.median(kept), len(quiet))
    return answer


@torch.inference_mode()
def main() -> None:
    """Measure every context and write the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain, _ = load_model(given.model, torch.bfloat16)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for context in map(int, given.contexts.split(",")):
        generator = torch.Generator().manual_seed(0)
        vocabulary = plain.config.vocab_size
        prompt = torch.randint(0, vocabulary, (1, context), generator=generator)
        ready = {}
        for name, kv_format, weights in RUNS:
            model = copy.deepcopy(plain)
            if weights == "int8":
                quantize_weights(model)
            ready[name, weights] = Stepper(model, kv_format, prompt)
        measured = measure({key: each.step for key, each in ready.items()}, given.steps)
        base = measured["transformers", "bf16"][1]
        for (name, weights), (best, median, quiet) in measured.items():
            rows.append(
                {
                    "context": context,
                    "cache": name,
                    "weights": weights,
                    "threads": given.threads,
                    "decode_ms_median": f"{median:.2f}",
                    "decode_ms_best": f"{best:.2f}",
                    "decode_tokens_per_s": f"{1e3 / median:.1f}",
                    "times_transformers": f"{base / median:.2f}",
                    "prefill_tokens_per_s": f"{context / ready[name, weights].prefill:.0f}",
                    "undisturbed": quiet,
                    "device": device_info("cpu").name,
                    "torch": torch.__version__,
                }
            )
            print(" ".join(map(str, list(rows[-1].values())[:10])), flush=True)
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
