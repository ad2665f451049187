"""Many short prompts in one row, isolated from each other, equal to running them one by one.

    python examples/packed_documents.py models/smollm2 --kv-format int8

Packing turns prompts of different lengths into one dense row without padding. The mask keeps them
apart, and position_ids restart in each, so that every prompt computes what it would alone.
"""

import argparse

import torch

import quantpage
from quantpage.masks import causal_document

PROMPTS = (
    "The capital of France is",
    "Two plus two is",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "Water boils at a temperature of",
    "The opposite of hot is",
)


@torch.inference_mode()
def compare(model, tokenizer, kv_format: str, backend: str = "flash_mask"):
    """Next-token logits of each prompt, [prompts, vocabulary]: packed, and one by one."""
    rows = [tokenizer(each, return_tensors="pt").input_ids[0] for each in PROMPTS]
    lengths = [len(row) for row in rows]
    packed_row = torch.cat(rows)[None].to(model.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(model.device)
    with quantpage.attach(model, kv_format, backend=backend, mask=causal_document(lengths)):
        out = model(packed_row, position_ids=positions, attention_mask=torch.ones_like(packed_row))
    last = torch.tensor(lengths).cumsum(0) - 1
    packed = out.logits[0, last].float().cpu()
    alone = []
    with quantpage.attach(model, kv_format):
        for row in rows:
            logits = model(row[None].to(model.device)).logits
            alone.append(logits[0, -1].float().cpu())
    return packed, torch.stack(alone)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int8")
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model, torch.float32)
    packed, alone = compare(model, tokenizer, given.kv_format)
    for prompt, mine, theirs in zip(PROMPTS, packed, alone, strict=True):
        words = [tokenizer.decode(int(each.argmax())) for each in (mine, theirs)]
        apart = (mine - theirs).abs().max().item()
        print(f"{prompt!r}: packed {words[0]!r}, alone {words[1]!r}, logits apart by {apart:.1e}")


if __name__ == "__main__":
    main()
