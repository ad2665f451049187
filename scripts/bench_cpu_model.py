"""A whole model on a CPU: decode tokens a second through each cache, Transformers' default beside.

Caches take turns in one process, so that a disturbance hits all of them; a figure is the median of
its turns. Random tokens, batch 1, bfloat16 weights unless --weights int8.

usage: python scripts/bench_cpu_model.py --model models/smollm2 [--contexts 512,2048,8192] [--csv F]
"""

import argparse
import csv
import statistics
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

import quantpage
from quantpage.hardware import device_info
from quantpage.integrations.hf_transformers.model import load_model

DEFAULT = "transformers"


def prompt_cache(model, ids, chunk=512):
    """A cache that holds ``ids``, and the seconds that it took."""
    cache, start = None, time.perf_counter()
    for first in range(0, ids.shape[1], chunk):
        out = model(
            ids[:, first : first + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
    return cache, out.logits[:, -1].argmax(-1, keepdim=True), time.perf_counter() - start


def decode(model, cache, token, steps):
    """Seconds of each of ``steps`` greedy steps, and the last token."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return times, token


def attached(model, name):
    return nullcontext() if name == DEFAULT else quantpage.attach(model, kv_format=name)


@torch.inference_mode()
def measure(model, names, context, turns, steps):
    """Per cache: median seconds a decode step, prefill tokens a second."""
    ids = torch.randint(5, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    state, times, prefill = {}, {name: [] for name in names}, {}
    for name in names:
        with attached(model, name):
            cache, token, seconds = prompt_cache(model, ids)
            _, token = decode(model, cache, token, 2)
        state[name], prefill[name] = (cache, token), context / seconds
    for _ in range(turns):
        for name in names:
            with attached(model, name):
                cache, token = state[name]
                new, token = decode(model, cache, token, steps)
                state[name] = (cache, token)
                times[name].append(statistics.median(new))
    return {name: (statistics.median(times[name]), prefill[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--contexts", default="512,2048,8000")
    parser.add_argument("--caches", default=f"{DEFAULT},none,int8,int4")
    parser.add_argument("--weights", choices=("model", "int8"), default="model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model, torch.bfloat16)
    if arguments.weights == "int8":
        from quantpage.integrations.int8_weights import quantize_weights

        quantize_weights(model)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    rows = []
    for context in map(int, arguments.contexts.split(",")):
        found = measure(
            model, arguments.caches.split(","), context, arguments.turns, arguments.steps
        )
        for name, (seconds, prefill) in found.items():
            row = {
                "cache": name,
                "weights": arguments.weights,
                "context": context,
                "decode_tokens_per_s": round(1 / seconds, 2),
                "prefill_tokens_per_s": round(prefill, 1),
                "threads": torch.get_num_threads(),
                "device": device_info("cpu").name,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "commit": commit,
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
