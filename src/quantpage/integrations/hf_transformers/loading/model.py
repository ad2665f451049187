"""Loading a decoder folder and reading the shape of its cache; which models are refused and why."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantpage.cache.layout import CacheLayout
from quantpage.cache.reach import EVERYTHING, Reach
from quantpage.errors import UnsupportedModel
from quantpage.formats import KVFormat
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.loading.checkpoint import (
    check_config,
    check_weights,
    errors_in_one_sentence,
    find_files,
    refuse_incomplete,
)
from quantpage.integrations.hf_transformers.loading.gguf_tokenizer import gguf_tokenizer
from quantpage.integrations.int8_weights import quantize_weights

if TYPE_CHECKING:
    from transformers import (
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    class Decoder(PreTrainedModel, GenerationMixin):
        """What Transformers' AutoModelForCausalLM loads."""


WEIGHTS = ("model", "int8")
"""As they are, or those of linear layers in eight bits."""

REFUSED: dict[str, str] = {
    "blip": "its cross-attention would keep the keys of pictures among those of its text",
    "cpmant": "it puts tokens of its own before a prompt, which no attention mask counts",
    "diffusion_gemma": "its decoder takes the keys of its encoder out of the cache by itself",
    "doge": "its attention learns a mask that is no function of positions",
    "inkling2": "its attention chooses keys by arguments that are not in the mask",
    "moshi": "it declares a sliding window that its depth decoder does not follow",
    "prophetnet": "its cache takes a prompt of one token, and its decoding reads padding",
    "xlm": "its body makes a cache of its own, beside the one that it is given",
}
"""model_type -> why its cache cannot be kept in quantized pages."""

_REFUSED_LAYERS = {
    "indexed": "an indexer chooses the keys",
    "heavily_compressed_attention": "keys are merged before they are cached",
    "compressed_sparse_attention": "keys are merged before they are cached",
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a capacity plan has to know of a model."""

    layers: int
    """Layers with an attention cache."""
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def layout(self, kv_format: KVFormat, page_size: int) -> CacheLayout:
        """The pages of one layer."""
        return CacheLayout(self.kv_heads, self.head_dim, kv_format, page_size, self.dtype)


def text_config(config: Any) -> Any:
    """The decoder's part of a configuration."""
    return config.get_text_config(decoder=True)


def device_of(model: Any) -> torch.device:
    """Where a model computes: where its weights are, or where accelerate brings them to."""
    device: torch.device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            brought = getattr(each, "execution_device", None)
            if brought is not None:
                return torch.device(brought)
    raise UnsupportedModel(
        f"{type(model).__name__}: expected weights, or hooks of accelerate that bring them, got "
        "a model on meta, whose weights are not loaded"
    )


def most_positions(config: Any) -> int | None:
    """Tokens that a model has positions for; None: its configuration names no limit."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def stock_layers(config: Any) -> list[Any]:
    """The layers of the cache that Transformers would make for a configuration."""
    from transformers import DynamicCache

    found: list[Any] = DynamicCache(config=config).layers  # type: ignore[arg-type]
    text = text_config(config)
    if not found and getattr(text, "num_kv_shared_layers", None) == 0:
        # 5.12 leaves all layers out where none is shared (Gemma 4 31B), as [:-0] does; [:n] is all.
        every = copy(text)
        every.num_kv_shared_layers = -text.num_hidden_layers
        found = DynamicCache(config=every).layers
    return found


def reaches_of(config: Any, layers: Sequence[Any] | None = None) -> list[Reach]:
    """How far back each layer of the cache sees.

    layers: what Transformers would make for this configuration; None: made here.
    """
    text = text_config(config)
    if layers is None:
        layers = stock_layers(config)
    chunks = getattr(text, "sliding_window", None) is None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["chunked_attention" if chunks else "sliding_attention"] * len(layers)

    def reach(kind: str, layer: Any) -> Reach:
        if not getattr(layer, "is_sliding", False):
            return EVERYTHING
        name = "chunk" if kind == "chunked_attention" else "window"
        return Reach(**{name: layer.sliding_window})

    return [reach(kind, layer) for kind, layer in zip(kinds, layers, strict=False)]


def lent_layers(config: Any) -> frozenset[int]:
    """Layers whose keys and values later layers use instead of their own (Gemma 3n)."""
    text = text_config(config)
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    if not shared:
        return frozenset()
    kinds = list(text.layer_types)
    own, last = kinds[:-shared], len(kinds) - shared - 1
    return frozenset(last - own[::-1].index(kind) for kind in {*kinds[-shared:]} & {*own})


def refuse_unsupported(config: "PreTrainedConfig") -> None:
    """Raise UnsupportedModel, in one sentence, for models that cannot work."""
    model_type = config.model_type
    if model_type in REFUSED:
        raise UnsupportedModel(f"{model_type}: {REFUSED[model_type]}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{model_type}: expected a decoder, got an encoder-decoder model")
    # Encoders are in Transformers' table of decoders, as a configuration can make decoders of them.
    if hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", True) is False:
        raise UnsupportedModel(f"{model_type}: expected a decoder, got an encoder")
    text = text_config(config)
    if getattr(text, "num_attention_heads", None) is None:
        raise UnsupportedModel(f"{model_type}: its configuration names no attention heads")
    for index in range(getattr(text, "num_hidden_layers", None) or 0):
        own = layer_config(text, index)
        q_heads, kv_heads = own.num_attention_heads, getattr(own, "num_key_value_heads", None)
        if kv_heads and q_heads % kv_heads:
            raise UnsupportedModel(
                f"{model_type}: layer {index}: expected query heads that are a multiple of its "
                f"{kv_heads} kv_heads, got {q_heads}"
            )
    for kind in getattr(text, "layer_types", None) or []:
        if kind in _REFUSED_LAYERS:
            raise UnsupportedModel(f"{model_type}: layer type {kind}: {_REFUSED_LAYERS[kind]}")


def layer_config(text: Any, index: int) -> Any:
    """What a decoder's configuration says of one layer, where layers may differ (Gemma 4)."""
    own = getattr(text, "per_layer_config", None)
    return text if own is None or index >= len(own) else own[index]


def model_shape(config: "PreTrainedConfig") -> ModelShape:
    """Layers of a configuration, and the heads of the first.

    Raises UnsupportedModel when it names no attention heads.
    """
    text = text_config(config)
    own = layer_config(text, 0)
    q_heads = getattr(own, "num_attention_heads", None)
    if q_heads is None:
        raise UnsupportedModel(f"{config.model_type}: its configuration names no attention heads")
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // q_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    kinds = kinds[: len(kinds) - shared]
    dtype = getattr(text, "dtype", None) or torch.bfloat16
    return ModelShape(
        layers=sum(kind in ("full_attention", "sliding_attention") for kind in kinds),
        q_heads=q_heads,
        kv_heads=getattr(own, "num_key_value_heads", None) or q_heads,
        head_dim=head_dim,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
    )


def load_config(path: str | Path) -> Any:
    """The configuration of a model folder, or of a config.json."""
    from transformers import AutoConfig

    folder, gguf = find_files(path, weights=False)
    extra = {"gguf_file": gguf} if gguf else {}
    if not gguf:
        check_config(folder / "config.json")
    with errors_in_one_sentence(path):
        return AutoConfig.from_pretrained(folder, local_files_only=True, **extra)


def check_format(path: str | Path, kv_format: str | KVFormat | LayerFormats) -> None:
    """FormatError for a choice that no model, or not this one, can have; no weights are read."""
    formats = LayerFormats.of(kv_format)
    if formats.rules:
        formats.of_layers(len(reaches_of(load_config(path))))


_TOKENIZERS = ("token*", "vocab*", "*.model", "merges*", "tekken*")
"""Files that tokenizers are kept in."""


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    weights: str = "model",
) -> "tuple[Decoder, PreTrainedTokenizerBase]":
    """(model, tokenizer) of a folder with safetensors, a GGUF file or an id of the hub, in
    evaluation mode.

    dtype: of weights and arithmetic; a name of torch's or 'auto', as they were saved. weights:
    'model', as they are, or 'int8', those of linear layers rounded, for decoding on a CPU.

    Raises UnsupportedModel for a model that cannot be attached, ValueError for files that are
    broken or incomplete, and for another dtype or other weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}; got {weights!r}")
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype: expected 'auto' or a dtype of torch, got {dtype!r}")
        dtype = found
    config = load_config(path)
    refuse_unsupported(config)
    folder, gguf = find_files(path)
    extra: dict[str, Any] = {"local_files_only": True}
    if gguf:
        extra["gguf_file"] = gguf
    check_weights(folder)
    if not gguf and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        raise ValueError(
            f"model: expected a tokenizer (tokenizer.json or tokenizer.model) in {path}, found none"
        )
    with errors_in_one_sentence(f"the tokenizer of {path}"):
        if gguf:
            tokenizer = gguf_tokenizer(folder / gguf, config.model_type)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    if gguf:
        from transformers import GgufConfig

        extra["quantization_config"] = GgufConfig(dequantize=True)
    with errors_in_one_sentence(path):
        # What does not fit is reported with the rest of what is wrong, by name.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **extra
        )
    model, loading = loaded
    refuse_incomplete(path, loading)
    model = model.to(device).eval()
    if weights == "int8":
        quantize_weights(model)
    return model, tokenizer
