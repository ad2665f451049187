"""What `--weights int8` costs, beside what bfloat16 itself costs, against float32 throughout.

python scripts/compare_weights.py models/smollm2 benchmarks/results/accuracy-weights-smollm2.csv

The text and the scores are those of `quantpage evaluate`; scored tokens are
read 16 at a time, as many as a decode step may have.
"""

import sys
from pathlib import Path

import torch

from quantpage.bench.rows import current_commit, write_table
from quantpage.evaluate.caches import ours, unquantized
from quantpage.evaluate.score import Scores, cut_windows, log_probabilities
from quantpage.evaluate.text import default_path, obtain, read
from quantpage.integrations.hf_transformers.loading.model import load_model
from quantpage.integrations.int8_weights import quantize_weights

WINDOWS, PROMPT, SCORED, CHUNK = 2, 1024, 1024, 16
RUNS = (("none", "bfloat16"), ("none", "int8"), ("int8", "bfloat16"), ("int8", "int8"))
"""Cache format, weights; activations are bfloat16."""


def main() -> None:
    """Score every run on the same windows and write a row each."""
    folder, out = sys.argv[1], Path(sys.argv[2])
    exact_model, tokenizer = load_model(folder, torch.float32)
    plain, _ = load_model(folder, torch.bfloat16)
    rounded = quantize_weights(load_model(folder, torch.bfloat16)[0])
    text = read(obtain(default_path()))
    scores = {run: Scores() for run in RUNS}
    for window in cut_windows(tokenizer, text, WINDOWS, PROMPT, SCORED):
        with unquantized(exact_model) as new_cache:
            exact = log_probabilities(exact_model, window, new_cache, CHUNK)
        for (cache, weights), found in scores.items():
            model = rounded if weights == "int8" else plain
            with ours(model.config, cache, 64).attaching(model) as new_cache:
                found.add(window, exact, log_probabilities(model, window, new_cache, CHUNK))
    rows = [
        {
            "cache": cache,
            "weights": weights,
            "perplexity": f"{found.perplexity:.4f}",
            "kl_mean": f"{found.mean_divergence:.3g}",
            "kl_p99": f"{found.p99_divergence:.3g}",
            "top1": f"{found.top1:.4f}",
            "tokens": found.tokens,
            "torch": torch.__version__,
            "commit": current_commit(),
        }
        for (cache, weights), found in scores.items()
    ]
    write_table(rows, out)


if __name__ == "__main__":
    main()
