"""Prefill and decode of the embedded engine on a GPU: the figures of scripts/vllm_plugin/speed.py.

    engine_speed.py KV_FORMAT [REQUESTS] [CONTEXT]

The same 8B-shaped Llama of 16 layers (LAYERS=n for another number) with random weights, the same
prompts, and the same two figures: prompt tokens/s of cold prompts; "steady" ms a step, the time of
129 tokens of prompts that are in the prefix cache minus that of 1. GRAPHS=0: without CUDA graphs.
"""

import os
import queue
import sys
import time

import torch
import transformers
from vllm_plugin.speed import CONFIG, LAYERS, prompts

import quantpage
from quantpage.engine import Engine, Limits, Request, Sampling


class Numbers:
    """A tokenizer for tokens that nobody reads."""

    def decode(self, tokens, skip_special_tokens=True):
        """A letter a token."""
        return "x" * len(tokens)


def main() -> None:
    """One line."""
    kv_format = sys.argv[1]
    requests, context = (int(each) for each in (sys.argv[2:4] or (16, 16384)))
    graphs = os.environ.get("GRAPHS", "1") == "1"
    named = {name: CONFIG[name] for name in CONFIG if name not in ("architectures", "torch_dtype")}
    config = transformers.LlamaConfig(**named)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    page_size = 64
    pages = 4 * requests * (context // page_size + 4)
    limits = Limits(pages=pages, max_running=requests, step_tokens=8192)
    with (
        quantpage.attach(model, kv_format, page_size=page_size) as attached,
        Engine(attached, Numbers(), limits, cuda_graphs=graphs) as engine,
    ):

        def seconds(kind: int, new: int) -> float:
            given = [each["prompt_token_ids"] for each in prompts(requests, context, kind)]
            ended: queue.SimpleQueue = queue.SimpleQueue()
            start = time.perf_counter()
            for ids in given:
                engine.submit(
                    Request(tuple(ids), new, Sampling(temperature=0)),
                    lambda piece: ended.put(piece) if piece.finish_reason else None,
                )
            for _ in given:
                piece = ended.get()
                assert piece.finish_reason == "length", piece
            return time.perf_counter() - start

        seconds(0, 4)
        one = min(seconds(kind, 1) for kind in (1, 2))
        seconds(2, 129)
        known = min(seconds(2, 1) for _ in range(2))
        steady = (min(seconds(2, 129) for _ in range(2)) - known) / 128
        replays = engine._runner.graphs.replays if graphs else 0
        print(
            f"SPEED engine {kv_format} {requests}x{context} layers {LAYERS}: "
            f"{requests * context / one:.0f} prompt tokens/s, steady {steady * 1e3:.2f} ms a step, "
            f"{replays} of {engine.stats().steps} steps were graphs",
            flush=True,
        )


if __name__ == "__main__":
    main()
