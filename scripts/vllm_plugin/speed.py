"""Prefill and decode of vLLM with one attention backend and cache dtype, on a GPU.

    speed.py BACKEND KV_DTYPE [REQUESTSxCONTEXT,..] [LLM settings as JSON]

An 8B-shaped Llama of 16 layers (LAYERS=n for another number) with random weights. Three figures:
prompt tokens/s of cold prompts; "mixed" ms a step, the time of 65 new tokens minus that of 1, both
cold, in which some requests are still in their prompts; "steady" ms a step, the same of 129 and 1
tokens of prompts that are in the prefix cache, so that every step decodes all requests.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS = int(os.environ.get("LAYERS", "16"))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


def prompts(requests: int, context: int, kind: int) -> list[dict[str, list[int]]]:
    """Prompts that share no beginning with those of another kind."""
    return [
        {
            "prompt_token_ids": [
                (7 * i * i + 3 * i + 11 * row + 997 * kind) % 31000 + 3 for i in range(context)
            ]
        }
        for row in range(requests)
    ]


def main() -> None:
    """One line a shape."""
    backend, dtype = sys.argv[1:3]
    asked = sys.argv[3] if len(sys.argv) > 3 else "16x16384"
    shapes = [tuple(map(int, each.split("x"))) for each in asked.split(",")]
    from vllm import LLM

    settings = {
        "max_model_len": max(each[1] for each in shapes) + 256,
        "max_num_seqs": max(each[0] for each in shapes), "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.85, "enable_prefix_caching": True, "disable_log_stats": True,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted({each[0] for each in shapes}),
        },
        **(json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            kv_cache_dtype=dtype, attention_config={"backend": backend}, **settings,
        )  # fmt: skip
        for requests, context in shapes:
            print(f"SPEED {backend} {dtype} {speed(llm, requests, context)}", flush=True)


def speed(llm: Any, requests: int, context: int) -> str:
    """The three figures of one shape."""
    from vllm import SamplingParams

    def seconds(kind: int, new: int) -> float:
        given = prompts(requests, context, kind)
        params = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(given, params, use_tqdm=False)
        return time.perf_counter() - start

    llm.reset_prefix_cache()
    seconds(0, 4)
    one, many = seconds(1, 1), seconds(2, 65)
    one = min(one, seconds(3, 1))
    known = min(seconds(2, 1) for _ in range(2))
    steady = (min(seconds(2, 129) for _ in range(2)) - known) / 128
    cache = llm.llm_engine.vllm_config.cache_config
    return (
        f"{requests}x{context} layers {LAYERS}: {requests * context / one:.0f} prompt tokens/s, "
        f"mixed {(many - one) / 64e-3:.2f} ms, steady {steady * 1e3:.2f} ms a step, "
        f"{cache.num_gpu_blocks} blocks of {cache.block_size}"
    )


if __name__ == "__main__":
    main()
