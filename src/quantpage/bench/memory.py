"""What a prompt leaves in memory, and the most it took: Transformers' own cache beside ours.

    quantpage bench memory --model models/smollm2 --out benchmarks/results/cpu-memory.csv
    quantpage bench memory --shape gemma-3-27b --context 8192 --out rows.csv

Every row is a process of its own, which first answers a short prompt. "held" are the pages that
hold tokens, "standing" are all tensors of the cache, "peak" is by how much the process (on a GPU
the allocator) grew at most during the prompt. Shapes are models of the kv_heads, windows and kinds
of layers of their name, a few layers in the same proportion, whose other sizes are as small as they
can be, with random weights.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantpage.bench.rows import Rows, environment

OWN = "transformers"
"""The row of Transformers' own cache."""
_GIVEN_BACK = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 20))
"""glibc gives freed memory back from 1 MiB on: what it keeps otherwise made peaks of the same
allocations scatter between 80 and 360 MiB."""
DECODED = 8
"""Tokens that follow the prompt, a step each."""
_REPEATED = ("sliding_attention",) * 5 + ("full_attention",)
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 1 << 20,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaConfig",
        {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
        | {"head_dim": 128},
    ),
    "gemma-3-27b": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"head_dim": 128, "sliding_window": 1024}
        | {"layer_types": [*_REPEATED]},
    ),
    "gpt-oss-120b": (
        "GptOssConfig",
        {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
        | {"head_dim": 64, "sliding_window": 128, "num_local_experts": 2}
        | {"num_experts_per_tok": 1},
    ),
}
"""Name -> configuration class of Transformers and what the cache's bytes depend on."""


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """One measurement."""

    model: str
    """A folder, or a name of SHAPES."""
    kv_format: str
    """A format, or ``OWN``."""
    context: int
    page_size: int
    device: str
    threads: int


def run(
    model: str,
    formats: Sequence[str],
    context: int,
    page_size: int,
    threads: int,
    out: Path | None,
) -> list[dict[str, Any]]:
    """Measure each format in its own process, Transformers' own cache first; write the CSV."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = Rows(
        out, environment(device), cache=12, held_mib=-9, standing_mib=-12, of_transformers=-15,
        peak_mib=-9, prompt_s=-8,
    )  # fmt: skip
    for name in (OWN, *formats):
        given = MemoryRequest(model, name, context, page_size, device, threads)
        command = [sys.executable, "-m", "quantpage.bench.memory", json.dumps(asdict(given))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | _GIVEN_BACK
        )
        if done.returncode:
            raise RuntimeError(f"{name}: the process that measures it ended with\n{done.stderr}")
        row = json.loads(done.stdout.splitlines()[-1])
        base = rows.made[0] if rows.made else row
        share = row["standing_mib"] / base["standing_mib"]
        rows.add(
            {
                **{key: row[key] for key in ("cache", "held_mib", "standing_mib")},
                "of_transformers": f"{share:.3f}",
                **row,
                "model": Path(model).name,
                "context": context,
                "page_size": page_size,
                "threads": threads,
            }
        )
    return rows.made


@torch.inference_mode()
def measure(given: MemoryRequest) -> dict[str, Any]:
    """One row, in this process."""
    from quantpage.integrations.hf_transformers import attach

    torch.set_num_threads(given.threads)
    model = _build(given)
    ids = torch.arange(given.context, device=given.device)[None] * 7919 % 400 + 3
    attached = None
    if given.kv_format != OWN:
        attached = attach(model, given.kv_format, page_size=given.page_size)
    warm = _prompt(model, ids[:, :300])
    _decode(model, warm)
    del warm
    gc.collect()
    with _Peak(given.device) as peak:
        start = time.perf_counter()
        cache = _prompt(model, ids)
        _wait(given.device)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    _decode(model, cache)
    _wait(given.device)
    step = (time.perf_counter() - start) / DECODED
    gc.collect()
    held, standing = _sizes(cache)
    if attached is not None:
        attached.detach()
    return {
        "cache": given.kv_format,
        "held_mib": round(held / 2**20, 2),
        "standing_mib": round(standing / 2**20, 2),
        "peak_mib": round(peak.grown / 2**20, 1),
        "prompt_s": round(seconds, 2),
        "decode_ms": round(step * 1e3, 2),
    }


def _build(given: MemoryRequest) -> Any:
    if given.model not in SHAPES:
        from quantpage.integrations.hf_transformers.loading.model import load_model

        return load_model(given.model, torch.bfloat16, given.device)[0]
    import transformers

    name, sizes = SHAPES[given.model]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**_SMALL, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(given.device).eval()


def _prompt(model: Any, ids: torch.Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    given = cache if model.config._attn_implementation != "quantpage" else None
    return model(ids, past_key_values=given, use_cache=True, logits_to_keep=1).past_key_values


def _decode(model: Any, cache: Any) -> None:
    token = torch.full((1, 1), 7, device=model.device)
    for _ in range(DECODED):
        model(token, past_key_values=cache, use_cache=True)


def _sizes(cache: Any) -> tuple[int, int]:
    """Bytes that hold tokens, and bytes of the tensors they stand in."""
    if hasattr(cache, "allocated_bytes"):
        return cache.used_bytes(), cache.allocated_bytes()
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    return (
        sum(each.nbytes for each in tensors),
        sum(each.untyped_storage().nbytes() for each in tensors),
    )


class _Peak:
    """By how much the memory in use grew at most inside of the ``with``.

    On a GPU the allocator tells. On a CPU the process's own pages are looked at every few
    milliseconds: weights are pages of a file, which the system drops and reads again as it likes.
    """

    def __init__(self, device: str) -> None:
        self._device, self.grown = device, 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Peak":
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _own_bytes()
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            self.grown = torch.cuda.max_memory_allocated() - self._before
        else:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.grown = max(self.grown, _own_bytes() - self._before)


def _own_bytes() -> int:
    """Resident bytes of this process that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(MemoryRequest(**json.loads(sys.argv[1])))))
