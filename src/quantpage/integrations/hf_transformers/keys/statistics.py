"""Keys and queries of a model, measured in its own forward.

The model runs unquantized and its attention is watched (watch): keys and queries after norms and
RoPE, whatever the architecture.

Without a text, tokens are drawn at random: what every key has in common, the turned bias of its
projection, and how far a norm's gains spread its channels, is a matter of the weights, and random
tokens show it in a second.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.formats.channel_ranges import ChannelRanges
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.integrations.hf_transformers.keys.watch import Attend, watched
from quantpage.integrations.hf_transformers.loading.model import text_config
from quantpage.ops.attend.params import exact_pairs

KEY_BIASES = (
    "k_proj.bias", "key.bias", "key_proj.bias", "k_lin.bias", "qkv_proj.bias", "qkv.bias",
    "query_key_value.bias", "c_attn.bias", "Wqkv.bias", "att_proj.bias",
)  # fmt: skip
"""How Transformers' decoders call the bias of a projection that makes keys."""

KEY_NORMS = ("k_norm.weight", "k_layernorm.weight", "key_norm.weight", "key_layernorm.weight")
"""And the gains of a norm of keys."""

_PAGE = 64
"""Tokens of a page where nobody says otherwise."""
_RANDOM_TOKENS = 1024


def key_traits(names: Iterable[str]) -> list[str]:
    """What a checkpoint's tensors say of its keys, in words: 'biases', 'norms'."""
    kinds = {"biases": KEY_BIASES, "norms": KEY_NORMS}
    known = [*names]
    return [word for word, ends in kinds.items() if any(name.endswith(ends) for name in known)]


def has_key_biases(model: nn.Module) -> bool:
    """Whether any key projection adds a bias other than 0."""
    return any(
        bias is not None and (bias.is_meta or bool(bias.any()))
        for name, bias in model.named_parameters()
        if name.endswith(KEY_BIASES)
    )


def has_uneven_key_norms(model: nn.Module) -> bool:
    """Whether any norm of keys has gains that differ."""
    return any(
        gain.is_meta or bool((gain != gain.flatten()[0]).any())
        for name, gain in model.named_parameters()
        if name.endswith(KEY_NORMS) and gain.numel()
    )


def measure_random(model: PreTrainedModel) -> dict[int, KeyStatistics]:
    """Statistics of every layer over random tokens, one behind the other; of the weights alone.

    Tokens without neighbours, at positions far apart, have other keys than those of a text.
    """
    config = text_config(model.config)
    noise = torch.Generator().manual_seed(0)
    longest = getattr(config, "max_position_embeddings", None) or _RANDOM_TOKENS
    drawn = torch.rand(1, min(_RANDOM_TOKENS, longest), generator=noise, dtype=torch.float64)
    # Tokenizers number first what is frequent: every power of two is drawn as often as the next.
    ids = (config.vocab_size**drawn).long().clamp_max(config.vocab_size - 1)
    return measure(model, [ids], skipped=16)


def measure(
    model: PreTrainedModel,
    texts: Iterable[Int[Tensor, "1 tokens"]],
    skipped: int,
    ranges: dict[int, tuple[ChannelRanges, ChannelRanges]] | None = None,
    found: dict[int, KeyStatistics] | None = None,
) -> dict[int, KeyStatistics]:
    """Statistics of every layer whose attention goes through Transformers' interface.

    texts: one forward each. skipped: first tokens of each that are not counted; models park
    attention on them, with keys like no others. ranges: where to put those of keys and of values,
    of all tokens; None: nowhere. found: what was measured before and is added to. Layers without
    keys in the usual sense are missing.
    """
    found = {} if found is None else found

    def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
        if query.shape[-1] != key.shape[-1]:
            return
        # From [1, heads, tokens, head_dim].
        q, k = (x[0].transpose(0, 1)[skipped:].detach() for x in (query, key))
        first = key[0].transpose(0, 1)[:1].detach()
        made = KeyStatistics.of(q, k, far_shares(key, value, attend)[skipped:], first)
        found[index] = found[index] + made if index in found else made
        if ranges is not None:
            seen = [ChannelRanges.of(x[0].transpose(0, 1).detach()) for x in (key, value)]
            if index in ranges:
                seen = [a + b for a, b in zip(ranges[index], seen, strict=True)]
            ranges[index] = (seen[0], seen[1])

    body: Any = model.base_model
    with watched(model, look), torch.no_grad():
        for ids in texts:
            body(input_ids=ids.to(model.device), use_cache=False)
    return found


def far_shares(
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens value_head_dim"],
    attend: Attend,
) -> Float[Tensor, "tokens q_heads"]:
    """How much of every query's attention goes to keys that a format with exact pages reads as
    codes; float32.

    Attention is asked with values that say in which page a key is, whatever its mask and logits.
    """
    tokens, width = value.shape[2:]
    at = torch.arange(tokens, device=value.device)
    shares = torch.zeros((), device=value.device)
    for first in range(0, -(-tokens // _PAGE), width):
        page = first + torch.arange(width, device=value.device)
        says = (at[:, None] // _PAGE == page).to(value.dtype)
        seen = attend(key, says.expand(value.shape).contiguous())[0].detach().float()
        coded = ~exact_pairs(at, page * _PAGE, _PAGE)
        shares = shares + (seen * coded[:, None]).sum(-1)
    return shares.clamp(0.0, 1.0)
