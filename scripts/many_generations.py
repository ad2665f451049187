#!/usr/bin/env python
"""Whether many short generations leave memory behind: one model, caches of every kind, in turns.

    python scripts/many_generations.py --count 2000                     a tiny random Llama
    python scripts/many_generations.py --count 2000 --model models/smollm2 --formats int4

A round is twenty prompts, the same in every round: a cache that generate() makes, one of prompts()
that remember a few pages, one that is reset and used again. After a round that went before, nothing
that is counted may differ; the process's memory is printed beside it. Exit code 1 where it does.
"""

import argparse
import gc
import resource
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import quantpage
from quantpage.bench.rows import current_commit
from quantpage.hardware import device_info

ROUND = 20
MOST_PAGES = 24
"""That the prompts remember."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is there after a round."""

    tensors: int
    """Tensors that Python knows of."""
    pages: tuple[int, ...]
    """That the pools of the remembered prompts and of the cache that is used again have."""
    allocated: int
    """Bytes of these."""
    remembered: int
    """Pages that prompts are known by."""


def rounds(model: Any, kv_format: str, count: int) -> Iterator[Held]:
    """Do ``count`` rounds; what is held after each."""
    given = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (ROUND,), generator=given).tolist()
    system = torch.randint(3, 100, (1, 40), generator=given)
    asked = {"do_sample": False, "pad_token_id": 0}
    with quantpage.attach(model, kv_format, page_size=16) as attached, torch.inference_mode():
        prompts, again = attached.prompts(MOST_PAGES), attached.new_cache()
        for _ in range(count):
            for turn, length in enumerate(lengths):
                own = torch.randint(3, 100, (1, length), generator=given.manual_seed(turn))
                ids = torch.cat([system, own], 1)
                caches: dict[str, Any] = {}
                if turn % 3:
                    again.reset()
                    cache = again if turn % 3 == 1 else prompts.new_cache(ids)
                    caches = {"past_key_values": cache}
                out = model.generate(ids, max_new_tokens=1 + turn % 7, **caches, **asked)
                if turn % 3 == 2:
                    prompts.remember(out[:, :-1], caches["past_key_values"])
            del caches, cache, out
            gc.collect()
            memories = (prompts._memory, again.rows.memory)
            yield Held(
                sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
                tuple(pages for each in memories for pair in each.size for pages in pair),
                sum(each.allocated_bytes() for each in memories),
                len(prompts),
            )


def tiny_model() -> Any:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="generations a format")
    parser.add_argument("--model", help="a folder; none: a tiny random model")
    parser.add_argument("--formats", default="int8,int4,none")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.model is None:
        model = tiny_model()
    else:
        from quantpage.integrations.hf_transformers.loading.model import load_model

        model, _ = load_model(asked.model)
    held_names = ",".join(each.name for each in fields(Held))
    print(f"format,generations,resident_mib,{held_names},device,model,torch,commit")
    where = ",".join(
        [
            device_info("cpu").name, Path(asked.model or "a llama of 2 layers").name,
            torch.__version__, current_commit(),
        ]
    )  # fmt: skip
    same = True
    for name in asked.formats.split(","):
        before = None
        count = -(-asked.count // ROUND)
        for number, held in enumerate(rounds(model, name, count)):
            told = ",".join(str(each).replace(", ", " ") for each in astuple(held))
            if number in (0, 1, count - 1) or number % max(1, count // 10) == 0:
                row = f"{name},{(number + 1) * ROUND},{resident_mib():.1f},{told},{where}"
                print(row, flush=True)
            # The first round makes what later ones find.
            same &= number < 2 or held == before
            before = held
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
