"""Keys and queries of a model, measured in its own forward.

The model runs unquantized and its attention is watched (watch): keys and queries after norms and
RoPE, whatever the architecture.

Without a text, tokens are drawn at random: what every key has in common, the turned bias of its
projection, and how far a norm's gains spread its channels, is a matter of the weights, and random
tokens show it in a second.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.formats.channel_ranges import ChannelRanges
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.integrations.hf_transformers.model import text_config
from quantpage.integrations.hf_transformers.watch import Attend, watched
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
_RANDOM_TOKENS = 256
_LONGEST = 4096
"""Positions that random tokens are spread over, where a model has so many."""


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
    """Statistics of every layer over random tokens at positions far apart; of the weights alone."""
    config = text_config(model.config)
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, _RANDOM_TOKENS), generator=noise)
    longest = min(_LONGEST, getattr(config, "max_position_embeddings", None) or _LONGEST)
    positions = None
    if longest > _RANDOM_TOKENS:
        chosen = torch.randperm(longest - 1, generator=noise)[: _RANDOM_TOKENS - 1] + 1
        positions = torch.cat([torch.zeros(1, dtype=torch.long), chosen.sort().values])[None]
    return measure(model, [ids], skipped=16, positions=positions)


def measure(
    model: PreTrainedModel,
    texts: Iterable[Int[Tensor, "1 tokens"]],
    skipped: int,
    positions: Int[Tensor, "1 tokens"] | None = None,
    ranges: dict[int, tuple[ChannelRanges, ChannelRanges]] | None = None,
    found: dict[int, KeyStatistics] | None = None,
) -> dict[int, KeyStatistics]:
    """Statistics of every layer whose attention goes through Transformers' interface.

    texts: one forward each. skipped: first tokens of each that are not counted; models park
    attention on them, with keys like no others. positions: of the tokens; None: 0, 1, 2, ...
    ranges: where to put those of keys and of values, of all tokens; None: nowhere. found: what was
    measured before and is added to. Layers without keys in the usual sense are missing.
    """
    found = {} if found is None else found

    def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
        if query.shape[-1] != key.shape[-1]:
            return
        # [1, heads, tokens, head_dim]
        q, k = (x[0].transpose(0, 1)[skipped:].detach() for x in (query, key))
        # Tokens at positions far apart have no neighbours.
        far = None if positions is not None else far_shares(key, value, attend)[skipped:]
        made = KeyStatistics.of(q, k, far)
        found[index] = found[index] + made if index in found else made
        if ranges is not None:
            seen = [ChannelRanges.of(x[0].transpose(0, 1).detach()) for x in (key, value)]
            if index in ranges:
                seen = [a + b for a, b in zip(ranges[index], seen, strict=True)]
            ranges[index] = (seen[0], seen[1])

    body: Any = model.base_model
    extra = {} if positions is None or not _takes_positions(body) else {"position_ids": positions}
    with watched(model, look), torch.no_grad():
        for ids in texts:
            moved = {name: each.to(model.device) for name, each in extra.items()}
            body(input_ids=ids.to(model.device), use_cache=False, **moved)
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


def _takes_positions(body: nn.Module) -> bool:
    return "position_ids" in inspect.signature(body.forward).parameters
