"""What a Transformers configuration says of its cache: pages, states and weights, no weights read.

``cache_shape(config).layers(formats, page_size)`` are the layouts that ``attach`` would allocate, a
layer each; ``cache/sizes`` counts their bytes.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from quantpage.cache.layout import CacheLayout
from quantpage.cache.reach import Reach
from quantpage.cache.sizes import LayerPlan, heads_each
from quantpage.errors import UnsupportedModel
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.loading.model import (
    layer_config,
    model_shape,
    reaches_of,
    refuse_unsupported,
    text_config,
)
from quantpage.integrations.hf_transformers.loading.skeleton import decoder_of, loaded_of
from quantpage.integrations.hf_transformers.modules.coverage import (
    caching_modules,
    crosses,
    refuse_own_cache,
    refuse_pageless,
)
from quantpage.integrations.hf_transformers.modules.latent import caches_latent_rows
from quantpage.ops.dispatch import Call

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

WEIGHTS = ("bf16", "int8", "none")
"""How the weights are counted: as they come in 16 bits, linear layers in int8, or not at all."""

_HYBRID = {"hybrid", "hybrid_sliding"}
"""Layer types with a state beside their keys and values."""
_PAGED = {"full_attention", "sliding_attention", "chunked_attention", *_HYBRID}
_EMPTY = {"moe", "mlp", "dummy"}
"""Layer types without any cache; the newest releases say dummy for these, and for layers that read
another layer's keys and values."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one layer, as its attention hands them to the cache."""

    kv_heads: int
    head_dim: int
    """Channels of a key; with multi-head latent attention of the latent."""
    value_head_dim: int
    """Channels of a value; with multi-head latent attention of the rotary part of the key."""
    reach: Reach
    latent: bool = False


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The cache of a model, on one of ``tp`` devices."""

    paged: dict[int, LayerShape]
    """Layers whose keys and values go to pages."""
    count: int
    """Layers of the cache in all: what "first2" and "last1" of a format count."""
    states: dict[str, int]
    """Layer type -> bytes that its layers keep of a request in place of keys and values."""
    dtype: torch.dtype

    def layers(self, formats: LayerFormats, page_size: int) -> list[LayerPlan]:
        """The pages of every paged layer. Raises FormatError where a format does not fit one."""
        chosen = formats.of_layers(self.count)
        return [
            LayerPlan(
                CacheLayout(
                    each.kv_heads,
                    each.head_dim,
                    chosen[index],
                    page_size,
                    self.dtype,
                    each.value_head_dim,
                    each.latent,
                ),
                each.reach,
            )
            for index, each in self.paged.items()
        ]

    @property
    def state_bytes(self) -> int:
        """Bytes of a request that are no keys and values, however long it is."""
        return sum(self.states.values())


def cache_shape(config: "PreTrainedConfig", tp: int = 1) -> CacheShape:
    """The cache that ``attach`` gives a model of this configuration.

    tp: devices that share the heads (tensor parallelism); a head that is not divided is on all of
    them. Raises UnsupportedModel, in one sentence, for what ``attach`` refuses and for what the
    configuration does not tell, ValueError for ``tp`` below 1 or by which heads do not divide.
    """
    if tp < 1:
        raise ValueError(f"tp: expected at least 1 device, got {tp}")
    refuse_unsupported(config)
    model = decoder_of(config)
    modules = {} if model is None else _caching(model, config)
    text = text_config(config)
    reaches = reaches_of(config)
    kinds = _kinds(text, len(reaches))
    dtype = _dtype(config, text)
    paged = {
        index: _layer(_of_kind(layer_config(text, index), kind), modules.get(index, []), reach, tp)
        for index, (kind, reach) in enumerate(zip(kinds, reaches, strict=True))
        # The keys of an encoder's tokens stay where Transformers keeps them.
        if kind in _PAGED and not (index in modules and crosses(modules[index]))
    }
    if not paged:
        raise UnsupportedModel(
            f"{config.model_type}: expected layers with keys and values, got "
            f"{', '.join(sorted(set(kinds)))}"
        )
    if model is not None and not paged.keys() & modules.keys():
        refuse_pageless(model)
    states: dict[str, int] = {}
    for kind in kinds:
        if kind in _HYBRID or kind not in _PAGED | _EMPTY:
            states[kind] = states.get(kind, 0) + _state_bytes(_of_kind(text, kind), kind, dtype, tp)
    return CacheShape(paged, len(kinds), states, dtype)


def calls_of(config: Any, call: Call) -> dict[Call, list[int]]:
    """``call`` with the heads and the dtype of a configuration, for each kind of heads its layers.

    Layers of one kind may see more or less of the text: that changes nothing in who serves them.
    Raises UnsupportedModel for a configuration that ``attach`` refuses.
    """
    shape = cache_shape(config)
    q_heads = model_shape(config).q_heads
    found: dict[Call, list[int]] = {}
    for index, each in shape.paged.items():
        asked = replace(
            call,
            dtype=shape.dtype,
            q_heads=q_heads,
            kv_heads=each.kv_heads,
            head_dim=each.head_dim,
            value_head_dim=each.value_head_dim,
            latent=each.latent,
        )
        found.setdefault(asked, []).append(index)
    return found


def weight_bytes(config: Any, weights: str = "bf16", tp: int = 1) -> int:
    """Bytes of the weights on each of ``tp`` devices, counted on a model without storage.

    weights: one of WEIGHTS; what ``attach`` and `quantpage generate` leave in 16 bits stays so.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}; got {weights!r}")
    if weights == "none":
        return 0
    model: Any = loaded_of(config)
    if model is None:
        raise UnsupportedModel(f"{config.model_type}: expected a model of Transformers' own")
    total = 2 * sum(each.numel() for each in model.parameters())
    if weights == "int8":
        shared = {id(model.get_input_embeddings().weight)}
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                # A head that shares the embedding's weights becomes a copy of its own.
                saved = 0 if id(module.weight) in shared else 2 * module.weight.numel()
                total += module.weight.numel() + 2 * module.out_features - saved
    return -(-total // tp)


def _caching(model: "nn.Module", config: Any) -> "dict[int, list[nn.Module]]":
    """The modules that cache keys and values, by layer, as ``attach`` finds them."""
    refuse_own_cache(model)
    found = caching_modules(model, type(text_config(config)))
    if not found:
        refuse_pageless(model)
    return found


def _kinds(text: Any, count: int) -> list[str]:
    """The layer types of the cache, as Transformers infers them."""
    from transformers import cache_utils

    infer = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    kinds = list(_inferred(text) if infer is None else infer(text)[0])
    assert len(kinds) == count
    # Recurrent Gemma keeps states in its modules, and its cache is not told of them.
    blocks = getattr(text, "layers_block_type", None) or kinds
    return [
        block if block == "recurrent" else kind for kind, block in zip(kinds, blocks, strict=True)
    ]


def _inferred(text: Any) -> list[str]:
    """The same of 5.12, which has no function for it."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        rules = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
        named = (kind for name, kind in rules.items() if getattr(text, name, None) is not None)
        kinds = [next(named, "full_attention")] * text.num_hidden_layers
    # Layers that read another layer's keys and values keep none.
    return kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]


def _dtype(config: Any, text: Any) -> torch.dtype:
    found = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.bfloat16
    return getattr(torch, found) if isinstance(found, str) else found


def _of_kind(text: Any, kind: str) -> Any:
    """``text`` as layers of a kind take it: those with a window may have numbers of their own, such
    as swa_head_dim (Inkling)."""
    own = {name: value for name, value in vars(text).items() if name.startswith("swa_")}
    if not own or "sliding" not in kind:
        return text
    found = copy(text)
    for name, value in own.items():
        setattr(found, name.removeprefix("swa_"), value)
    return found


def _layer(own: Any, modules: "list[nn.Module]", reach: Reach, tp: int) -> LayerShape:
    """Heads and channels of one layer of this configuration, whose keys and values ``modules``
    cache."""
    q_heads = getattr(own, "num_attention_heads", None)
    if not q_heads:
        raise UnsupportedModel(f"{own.model_type}: its configuration names no attention heads")
    if q_heads % tp:
        raise ValueError(f"tp: expected a number that divides {q_heads} query heads, got {tp}")
    latent = getattr(own, "kv_lora_rank", None)
    if latent and caches_latent_rows():
        # One latent for all heads, and the rotary part of the key in the place of the value.
        return LayerShape(1, latent, own.qk_rope_head_dim, reach, latent=True)
    if latent:
        key_dim = own.qk_nope_head_dim + own.qk_rope_head_dim
        return LayerShape(q_heads // tp, key_dim, own.v_head_dim, reach)
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // q_heads
    heads = _projected_heads(modules, head_dim) or getattr(own, "num_key_value_heads", None)
    heads = heads or getattr(own, "num_kv_heads", None)
    if getattr(own, "new_decoder_architecture", False):
        # Falcon's second kind caches its keys once a query head.
        heads = q_heads
    elif getattr(own, "multi_query", False):
        heads = 1
    value_dim = getattr(own, "v_head_dim", None) or head_dim
    return LayerShape(heads_each(heads or q_heads, tp), head_dim, value_dim, reach)


def _projected_heads(modules: "list[nn.Module]", head_dim: int) -> int | None:
    """kv_heads by the width of the keys' projection, where a layer has one of its own: its code may
    give it others than the configuration names (MiMo V2)."""
    for module in modules:
        rows = getattr(getattr(module, "k_proj", None), "out_features", None)
        if isinstance(rows, int) and getattr(module, "head_dim", None) == head_dim:
            return rows // head_dim
    return None


def _state_bytes(text: Any, kind: str, dtype: torch.dtype, tp: int) -> int:
    """Bytes of one layer's convolution and recurrent states of a request."""
    for names, size in _STATES:
        if all(isinstance(getattr(text, name, None), int) for name in names):
            convolution, recurrent = size(text)
            return -(-(convolution * dtype.itemsize + recurrent * 4) // tp)
    raise UnsupportedModel(
        f"{text.model_type}: layer type {kind}: how much state it keeps is not told by its "
        "configuration in a way that is known here"
    )


def _delta_rule(text: Any) -> tuple[int, int]:
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    convolution = (2 * keys + values) * text.linear_conv_kernel_dim
    return convolution, values * text.linear_key_head_dim


def _kimi_delta(text: Any) -> tuple[int, int]:
    width = text.linear_num_heads * text.linear_head_dim
    return 3 * width * text.linear_conv_kernel_dim, width * text.linear_head_dim


def _linear_unit(text: Any) -> tuple[int, int]:
    return text.lru_width * (text.conv1d_width - 1), text.lru_width


def _compressed_convolution(text: Any) -> tuple[int, int]:
    heads = text.num_attention_heads + text.num_key_value_heads
    convolution = heads * text.head_dim * (text.cca_time0 + text.cca_time1 - 2)
    # And the half of the last token's value that the next one is given.
    return convolution + text.num_key_value_heads * text.head_dim // 2, 0


def _short_convolution(text: Any) -> tuple[int, int]:
    return text.hidden_size * text.conv_L_cache, 0


def _four_convolutions(text: Any) -> tuple[int, int]:
    """Of keys, values, and what attention and MLP give; kept in float32."""
    keys = text.num_key_value_heads * text.head_dim
    return 0, 2 * (keys + text.hidden_size) * text.conv_kernel_size


def _mamba2(text: Any) -> tuple[int, int]:
    inner, states = text.mamba_n_heads * text.mamba_d_head, text.mamba_d_state
    return (inner + 2 * text.mamba_n_groups * states) * text.mamba_d_conv, inner * states


def _nemotron(text: Any) -> tuple[int, int]:
    inner, states = text.mamba_num_heads * text.mamba_head_dim, text.ssm_state_size
    return (inner + 2 * text.n_groups * states) * text.conv_kernel, inner * states


def _mamba1(text: Any) -> tuple[int, int]:
    inner = text.mamba_expand * text.hidden_size
    return inner * text.mamba_d_conv, inner * text.mamba_d_state


_STATES = (
    (("linear_num_value_heads", "linear_conv_kernel_dim"), _delta_rule),
    (("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"), _kimi_delta),
    (("mamba_n_heads", "mamba_d_head", "mamba_n_groups"), _mamba2),
    (("mamba_num_heads", "ssm_state_size", "conv_kernel"), _nemotron),
    (("mamba_expand", "mamba_d_state", "mamba_d_conv"), _mamba1),
    (("lru_width", "conv1d_width"), _linear_unit),
    (("cca_time0", "cca_time1"), _compressed_convolution),
    (("conv_L_cache",), _short_convolution),
    (("number_of_conv_states", "conv_kernel_size"), _four_convolutions),
)
"""Fields that tell a kind of state -> (numbers of the convolution in the model's dtype, numbers of
the recurrent state in float32)."""
