"""Whether a model says the same on a GPU as on a CPU, in each cache format.

    python scripts/compare_devices.py --model models/smollm2 --device cpu --out cpu.json
    python scripts/compare_devices.py --model models/smollm2 --device cuda --against cpu.json

Greedy answers in bfloat16. Two devices round differently, so that one near tie turns a text for
good: the comparison says how many tokens agree before the first that does not, and how far apart
the two best logits were there.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantpage

FORMATS = ("none", "int8", "int8_exact", "fp8", "k8v4", "int4")
PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short letter to a friend who wants to learn to cook. " * 24,
)


@torch.inference_mode()
def answers(model, tokenizer, kv_format: str, new_tokens: int) -> list[dict]:
    """Tokens and, for each, the distance of the best logit to the second."""
    said = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with quantpage.attach(model, kv_format=kv_format):
            out = model.generate(
                **ids,
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack(out.logits).float()[:, 0].topk(2).values
        tokens = out.sequences[0, ids["input_ids"].shape[1] :]
        said.append({"tokens": tokens.tolist(), "margins": (best[:, 0] - best[:, 1]).tolist()})
    return said


def compare(kv_format: str, here: list[dict], there: list[dict], tokenizer) -> None:
    for number, (a, b) in enumerate(zip(here, there, strict=True)):
        pairs = zip(a["tokens"], b["tokens"], strict=False)
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if same is None:
            verdict = f"same text ({len(a['tokens'])} tokens)"
        else:
            margin = b["margins"][same]
            verdict = f"same for {same} of {len(a['tokens'])} tokens, then a tie of {margin:.3f}"
        text = tokenizer.decode(a["tokens"][:16]).replace("\n", " ")
        print(f"{kv_format:11} prompt {number}: {verdict}   {text!r} ..", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the answers as JSON")
    parser.add_argument("--against", type=Path, help="answers of another device")
    chosen = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
    model = model.to(chosen.device).eval()
    other = json.loads(chosen.against.read_text()) if chosen.against else None
    found = {}
    for kv_format in chosen.formats.split(","):
        found[kv_format] = answers(model, tokenizer, kv_format, chosen.new_tokens)
        if other:
            compare(kv_format, found[kv_format], other[kv_format], tokenizer)
        else:
            print(f"{kv_format}: {tokenizer.decode(found[kv_format][0]['tokens'])!r}", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
