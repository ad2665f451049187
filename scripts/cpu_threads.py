"""Decode steps of SmolLM2's shape by threads: rows for benchmarks/results/cpu-threads.csv.

    cpu_threads.py --out FILE [--threads 1 2 4 8 16] [--contexts 512 4096] [--commit HASH]

Random weights in int8, an int8 cache, one request; milliseconds by the clock, medians of a turn.
Threads take turns within a context. Rows are written as they come.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import transformers as tf
from serve_speed import device

import quantpage
from quantpage.bench.rows import current_commit
from quantpage.integrations.int8_weights import quantize_weights

COLUMNS = ("what", "threads", "context", "turn", "ms", "clock", "device", "torch", "commit")
VOCABULARY, STEPS, COLD, TURNS = 49152, 24, 4, 2


def random_model() -> tf.LlamaForCausalLM:
    """SmolLM2-135M's layers with numbers of their usual size."""
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    quantize_weights(model)
    return model


@torch.inference_mode()
def main() -> None:
    """Time it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--commit", default=current_commit(), help="where git is not at hand")
    given = parser.parse_args()
    model, where = random_model(), [device(), torch.__version__, given.commit]
    with given.out.open("w") as file, quantpage.attach(model, "int8") as attached:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for context in given.contexts:
            torch.set_num_threads(max(given.threads))
            cache = attached.new_cache()
            model(torch.randint(VOCABULARY, (1, context)), past_key_values=cache, logits_to_keep=1)
            for turn in range(TURNS):
                for threads in given.threads:
                    torch.set_num_threads(threads)
                    ms = timed(model, cache)
                    row = ["decode step", threads, context, turn, f"{ms:.3f}", "wall", *where]
                    print(*row)
                    rows.writerow(row)
                    file.flush()


def timed(model: tf.LlamaForCausalLM, cache: quantpage.QuantPageCache) -> float:
    """The median of some steps, the first ones left out."""
    token, found = torch.randint(VOCABULARY, (1, 1)), []
    for _ in range(STEPS):
        begin = time.perf_counter()
        model(token, past_key_values=cache)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[COLD:]) * 1e3


if __name__ == "__main__":
    main()
