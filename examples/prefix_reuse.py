"""A system prompt that many questions begin with, computed once.

    python examples/prefix_reuse.py models/smollm2 --kv-format int8

``prompts()`` finds what it knows by the tokens themselves. Its pages are shared, not copied, and
the answers are those of computing everything.
"""

import argparse
import time

import torch

import quantpage

SYSTEM = "You answer questions about a library. " + "It is open from nine to five. " * 30
QUESTIONS = ("When does it open?", "When does it close?", "May I come at ten?")


@torch.inference_mode()
def answers(attached, system, questions, max_new_tokens: int, known: bool):
    """(tokens of the answer, tokens that were in the cache before) of each question.

    system, questions: ids, [1, tokens] each. known: False computes the system prompt every time.
    """
    prompts = attached.prompts()
    if known:
        prompts.learn(system)
    for question in questions:
        ids = torch.cat([system, question], 1)
        cache = prompts.new_cache(ids) if known else attached.new_cache()
        held = cache.get_seq_length()
        out = attached.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        yield out[0, ids.shape[1] :], held


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int8")
    flags.add_argument("--max-new-tokens", type=int, default=24)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model)
    system = tokenizer(SYSTEM, return_tensors="pt").input_ids
    questions = [tokenizer(f"\n{each}\n", return_tensors="pt").input_ids for each in QUESTIONS]
    with quantpage.attach(model, given.kv_format) as attached:
        for known in (False, True):
            print("the system prompt is learnt" if known else "everything is computed")
            began = time.perf_counter()
            made = answers(attached, system, questions, given.max_new_tokens, known)
            for question, (tokens, held) in zip(QUESTIONS, made, strict=True):
                took, began = time.perf_counter() - began, time.perf_counter()
                said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                print(f"  {question} {said!r} ({held} tokens known, {took:.2f} s)")


if __name__ == "__main__":
    main()
