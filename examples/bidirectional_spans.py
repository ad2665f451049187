"""Spans inside causal text that see all of themselves, as images do in multimodal models.

    python examples/bidirectional_spans.py models/smollm2 --kv-format int8

The text between [ and ] stands for an image: each of its tokens sees the whole span, the rest
is causal (masks.image_spans; one span from the start on is a prefix LM). The logits are
compared with Transformers' own attention under the same mask, written out densely, and the text is
continued: new tokens are causal.
"""

import argparse

import torch

import quantpage
from quantpage.masks import Mask, image_spans

TEXT = (
    "Here is a picture: [a harbour at dawn, three fishing boats, gulls over the water, and a "
    "lighthouse on the cliff behind them] and here is another: [a crowded market with baskets of "
    "oranges and a woman counting coins] In the first picture, there are"
)


def find_spans(tokenizer, text: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Token ids of the text without brackets, and the token ranges that were inside them."""
    ids: list[int] = []
    spans = []
    for number, piece in enumerate(text.replace("]", "[").split("[")):
        start = len(ids)
        ids += tokenizer(piece).input_ids
        if number % 2:
            spans.append((start, len(ids)))
    return torch.tensor([ids]), spans


@torch.inference_mode()
def prompt_logits(model, ids, mask: Mask, kv_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, vocabulary] over quantized pages, and of Transformers with the dense mask."""
    with quantpage.attach(model, kv_format, backend="flash_mask", mask=mask):
        ours = model(ids).logits[0].float()
    seen = mask.materialize(torch.arange(ids.shape[1]), ids.shape[1])
    dense = torch.where(seen, 0.0, torch.finfo(model.dtype).min).to(model.dtype)[None, None]
    theirs = model(ids, attention_mask=dense.to(model.device), use_cache=False).logits[0].float()
    return ours, theirs


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int8")
    flags.add_argument("--max-new-tokens", type=int, default=24)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model, torch.float32)
    ids, spans = find_spans(tokenizer, TEXT)
    mask = image_spans(ids.shape[1], spans)
    print(mask.draw(ids.shape[1], tile=(16, 16)))
    ours, theirs = prompt_logits(model, ids, mask, given.kv_format)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    apart = (ours - theirs).abs().max().item()
    print(f"against dense attention: logits apart by {apart:.1e}, same best token {same:.0%}")
    with quantpage.attach(model, given.kv_format, backend="flash_mask", mask=mask):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=given.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    print(tokenizer.decode(out[0, ids.shape[1] :]))


if __name__ == "__main__":
    main()
