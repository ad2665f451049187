"""A conversation whose cache is kept: each turn computes what is new in it, and nothing again.

    python examples/chat_with_a_kept_cache.py models/smollm2 --kv-format int8

Ids are always those of the whole conversation. What the cache holds of them is found by comparing
tokens, and what differs (templates end an answer in their own way) is cropped off before.
"""

import argparse
from dataclasses import dataclass, field

import torch

import quantpage


@dataclass
class Conversation:
    """The messages so far, and a cache that holds their tokens."""

    attached: quantpage.Attached
    tokenizer: object
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: quantpage.QuantPageCache | None = None
    held: list[int] = field(default_factory=list)
    """Tokens in the cache."""

    @torch.inference_mode()
    def ask(self, question: str, max_new_tokens: int = 80) -> tuple[str, int, int]:
        """The answer, how many tokens of the conversation were in the cache, and how many not."""
        self.messages.append({"role": "user", "content": question})
        prompt = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        ids = prompt[0].tolist()
        if self.cache is None:
            self.cache = self.attached.new_cache()
        common = shared_length(self.held, ids[:-1])
        if common < len(self.held):
            self.cache.crop(common)
        out = self.attached.model.generate(
            prompt.to(self.attached.model.device),
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[0].tolist()
        # The last token was chosen and not computed: it is not in the cache yet.
        self.held = out[: self.cache.get_seq_length()]
        answer = self.tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer, common, len(ids) - common


def shared_length(held: list[int], wanted: list[int]) -> int:
    """How many tokens both begin with."""
    for index, (mine, theirs) in enumerate(zip(held, wanted, strict=False)):
        if mine != theirs:
            return index
    return min(len(held), len(wanted))


QUESTIONS = (
    "My name is Ada. What is a cache?",
    "Give one example.",
    "What is my name?",
)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int8")
    flags.add_argument("--max-new-tokens", type=int, default=80)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model)
    with quantpage.attach(model, given.kv_format) as attached:
        talk = Conversation(attached, tokenizer)
        for question in QUESTIONS:
            answer, kept, new = talk.ask(question, given.max_new_tokens)
            print(f"> {question}\n{answer}\n[{kept} tokens kept, {new} computed]\n")


if __name__ == "__main__":
    main()
