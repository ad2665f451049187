"""Keys and queries of a model, measured in its own forward.

The model runs unquantized and its attention is watched (watch): keys and queries after norms and
RoPE, whatever the architecture.

Without a text, tokens are drawn at random: what every key has in common, the turned bias of its
projection, and how far a norm's gains spread its channels, is a matter of the weights, and random
tokens show it in a second.

Keys and queries are turned by their position, and slowly in some channels: what they have in common
at the first thousand positions is another thing at the eighth. Texts are therefore placed over all
positions that a map is for (``placed``), the first ones denser, as long contexts have those too.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.formats.channel_ranges import ChannelRanges
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.integrations.hf_transformers.keys.watch import Attend, watched
from quantpage.integrations.hf_transformers.loading.model import device_of, text_config
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
_RANDOM_CONTEXT = 4096


class Placed(NamedTuple):
    """A text, measured as if it stood in a longer one."""

    tokens: Int[Tensor, "1 tokens"]
    first: int
    """Position of its first token."""


def placed(texts: Sequence[Int[Tensor, "1 tokens"]], context: int) -> list[Placed]:
    """Texts of one length over positions 0 .. context - 1.

    The first two begin at 0, the last ends with ``context``, those between in equal ratios.
    """
    length = max((each.shape[1] for each in texts), default=1)
    ratio = max(1.0, context / length)
    steps = max(1, len(texts) - 2)
    return [
        Placed(each, round(length * (ratio ** (max(0, index - 1) / steps) - 1.0)))
        for index, each in enumerate(texts)
    ]


def longest_context(model: nn.Module) -> int | None:
    """Up to which position texts can be placed; None: anywhere, 0: only where texts begin.

    Frequencies that change where a text gets long are left as they are in short ones.
    """
    body: Any = getattr(model, "base_model", model)
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return 0
    config = text_config(body.config)
    turns = getattr(config, "rope_parameters", None) or {}
    kinds = turns.values() if all(isinstance(x, dict) for x in turns.values()) else [turns]
    limits = [
        each.get("original_max_position_embeddings")
        for each in kinds
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    limits += [getattr(config, "original_max_position_embeddings", None)] if limits else []
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((each for each in limits if each), default=None)


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

    Tokens without neighbours have other keys than those of a text. Where texts can be placed, they
    stand at positions up to _RANDOM_CONTEXT.
    """
    config = text_config(model.config)
    noise = torch.Generator().manual_seed(0)
    most = longest_context(model)
    longest = getattr(config, "max_position_embeddings", None) or _RANDOM_TOKENS
    texts, length = (1, _RANDOM_TOKENS) if most == 0 else (4, _RANDOM_TOKENS // 2)
    drawn = torch.rand(
        texts, min(length, longest), generator=noise, dtype=torch.float64, device="cpu"
    )
    # Tokenizers number first what is frequent: every power of two is drawn as often as the next.
    ids = (config.vocab_size**drawn).long().clamp_max(config.vocab_size - 1)
    context = _RANDOM_CONTEXT if most is None else min(_RANDOM_CONTEXT, most)
    return measure(model, placed(ids.split(1), context), skipped=16)


def measure(
    model: PreTrainedModel,
    texts: Iterable[Int[Tensor, "1 tokens"] | Placed],
    skipped: int,
    ranges: dict[int, tuple[ChannelRanges, ChannelRanges]] | None = None,
    found: dict[int, KeyStatistics] | None = None,
) -> dict[int, KeyStatistics]:
    """Statistics of every layer whose attention goes through Transformers' interface.

    texts: one forward each, from position 0 unless placed. skipped: first tokens of each that are
    not counted; models park attention on them, with keys like no others. ranges: where to put those
    of keys and of values, of all tokens; None: nowhere. found: what was measured before and is
    added to. Layers without keys in the usual sense are missing.
    """
    found = {} if found is None else found
    start = 0

    def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
        if query.shape[-1] != key.shape[-1]:
            return
        # From [1, heads, tokens, head_dim].
        q, k = (x[0].transpose(0, 1)[skipped:].detach() for x in (query, key))
        # What begins a text is not found further on.
        first = key[0].transpose(0, 1)[: int(start == 0)].detach()
        made = KeyStatistics.of(q, k, far_shares(key, value, attend)[skipped:], first)
        found[index] = found[index] + made if index in found else made
        if ranges is not None:
            seen = [ChannelRanges.of(x[0].transpose(0, 1).detach()) for x in (key, value)]
            if index in ranges:
                seen = [a + b for a, b in zip(ranges[index], seen, strict=True)]
            ranges[index] = (seen[0], seen[1])

    body: Any = model.base_model
    device = device_of(model)
    with watched(model, look), torch.no_grad():
        for each in texts:
            ids, start = each if isinstance(each, Placed) else (each, 0)
            at = {}
            if start:
                at["position_ids"] = torch.arange(start, start + ids.shape[1], device="cpu")[None]
            body(
                input_ids=ids.to(device),
                use_cache=False,
                **{name: x.to(device) for name, x in at.items()},
            )
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
