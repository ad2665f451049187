"""Quantized pages inside Transformers' own continuous batching (``generate_batch``).

    python examples/transformers_batching.py models/smollm2 --kv-format int8

Its scheduler, prefix sharing and forks stay; two hooks replace what it keeps and how it attends:
the class whose name ``continuous_api`` makes its cache of, and an attention function. Neither hook
is public, and three releases in a row have moved them, so that other versions than ``TESTED`` are
refused. ``quantpage serve`` and ``quantpage generate --file`` need no hooks; this is for programs
that are built around ``generate_batch`` already.
"""

import argparse
from itertools import pairwise
from unittest import mock

import torch
import transformers
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import quantpage
from quantpage.cache import PageCopy

TESTED = "5.17."
NAME = "paged|quantpage_flash"
"""``paged|``: made for continuous batching; ``flash``: needs no mask as a tensor."""
PROMPTS = (
    "The key-value cache is",
    "Once upon a time",
    "In Python, a list",
    "Once upon a time there was a king who",
)


def pages_class(kv_format: str, page_size: int) -> type[PagedAttentionCache]:
    """Transformers' cache, but what it keeps of a token and layer is codes and scales."""

    class QuantizedPages(PagedAttentionCache):
        def __init__(self, config, continuous_batching_config, device, *rest, dtype, **named):
            # Its own 16-bit tensors come to be on ``meta``, where they take no memory.
            super().__init__(
                config, continuous_batching_config, "meta", *rest, dtype=dtype, **named
            )
            if self.num_sliding_attention_groups:
                raise ValueError("expected a model without sliding windows")
            self.device = torch.device(device)
            layout = quantpage.CacheLayout(
                kv_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                format=quantpage.find_format(kv_format),
                page_size=page_size,
                dtype=dtype,
            )
            # Two blocks more than are given away: Transformers pads steps to and from them.
            self.pages = quantpage.PagedKVCache(pages=self.num_blocks + 2, device=self.device)
            for layer in self.layer_index_to_group_indices:
                self.pages.add_layer(layer, layout)
            call = quantpage.Call(
                quantpage.device_info(device), layout.format, dtype,
                q_heads=config.num_attention_heads, kv_heads=layout.kv_heads,
                head_dim=layout.head_dim, value_head_dim=layout.head_dim, page_size=page_size,
            )  # fmt: skip
            self.attend = quantpage.build_attention("flash", quantpage.CausalMask(), call)
            self.plan: quantpage.BatchPlan | None = None

        def copy_cache(self, list_source_blocks, list_forked_blocks):
            """Blocks of a request that became two."""
            pairs = zip(list_source_blocks, list_forked_blocks, strict=True)
            self.pages.copy_pages([PageCopy(*each) for each in pairs])

        def step(self, layer: int, lens, contexts, written, read) -> quantpage.BatchPlan:
            """The step as ops take it; made by its first layer.

            lens, contexts: tokens of each request. written, read: rows of new and of all tokens in
            Transformers' cache, page by page ours; none are read where prompts stand alone.
            """
            if layer == 0:
                rows, tokens = (read, contexts) if read.numel() else (written, lens)
                rows = rows[: sum(tokens)].split(tokens)
                pages = [(each[::page_size] // page_size).tolist() for each in rows]
                self.plan = quantpage.plan_batch(lens, contexts, pages, page_size, self.device)
            return self.plan

    return QuantizedPages


def attention(module, query, key, value, attention_mask, scaling=None, **step):
    """Write a step's keys and values, attend to what the pages hold.

    query, key, value: [1, heads, tokens, head_dim], rotated. step: Transformers' cache, and where
    in it the step's tokens are.
    """
    cache, ends = step["cache"], step["cu_seq_lens_k"]
    if isinstance(ends, dict):
        ends = ends["full_attention"]
    lens, contexts = (
        [b - a for a, b in pairwise(each.tolist())] for each in (step["cu_seq_lens_q"], ends)
    )
    plan = cache.step(
        module.layer_idx, lens, contexts, step["write_index"][0], step["read_index"][0]
    )
    q, k, v = (each[0].transpose(0, 1)[: plan.num_tokens] for each in (query, key, value))
    params = quantpage.AttendParams(softmax_scale=scaling or q.shape[-1] ** -0.5)
    layer = cache.pages.layer(module.layer_idx)
    out, _ = cache.attend(q, k, v, layer, plan, quantpage.WriteParams(), params)
    return out[None], None


def answers(model, prompts, kv_format: str, max_new_tokens: int, page_size: int = 64):
    """Greedy answers (lists of ids) to ``prompts`` (lists of ids), in their order."""
    if not transformers.__version__.startswith(TESTED):
        raise RuntimeError(
            f"expected transformers {TESTED}x, whose continuous batching these hooks fit, "
            f"got {transformers.__version__}"
        )
    if quantpage.find_format(kv_format).exact_pages is not None:
        raise ValueError(f"expected a format without exact pages, got {kv_format!r}")
    AttentionInterface.register(NAME, attention)
    before, model.config._attn_implementation = model.config._attn_implementation, NAME
    own = pages_class(kv_format, page_size)
    try:
        with mock.patch.object(continuous_api, "PagedAttentionCache", own):
            made = model.generate_batch(
                inputs=prompts,
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=model.generation_config.eos_token_id,
                    pad_token_id=0,
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    block_size=page_size,
                    num_blocks=256,
                    max_batch_tokens=256,
                    max_blocks_per_request=0,
                    use_cuda_graph=False,
                ),
                progress_bar=False,
            )
    finally:
        model.config._attn_implementation = before
    return [each.generated_tokens for each in made.values()]


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int8")
    flags.add_argument("--max-new-tokens", type=int, default=24)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model)
    ids = [tokenizer(each).input_ids for each in PROMPTS]
    made = answers(model, ids, given.kv_format, given.max_new_tokens)
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        print(f"{prompt} {tokenizer.decode(tokens, skip_special_tokens=True).strip()!r}")


if __name__ == "__main__":
    main()
