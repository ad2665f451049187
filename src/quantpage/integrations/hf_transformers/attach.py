"""Attaching quantized pages to a Transformers model, and taking them off again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.attention import find_backend
from quantpage.cache import CacheLayout
from quantpage.errors import FormatError, UnsupportedModel
from quantpage.formats import KVFormat
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import CacheOptions, PagedLayer
from quantpage.integrations.hf_transformers.cache.prompts import Prompts, load_cache, save_cache
from quantpage.integrations.hf_transformers.hooks import functions
from quantpage.integrations.hf_transformers.hooks.own import (
    is_attached,
    keep_attention,
    use_attention,
)
from quantpage.integrations.hf_transformers.hooks.supply import (
    Supply,
    attention_configs,
    decoders,
    is_hooked,
)
from quantpage.integrations.hf_transformers.keys.key_maps import AUTO, KeyMaps, find_key_maps
from quantpage.integrations.hf_transformers.loading.model import (
    model_shape,
    refuse_unsupported,
    text_config,
)
from quantpage.integrations.hf_transformers.modules.coverage import (
    Coverage,
    Ledger,
    caching_modules,
    crosses,
    refuse_own_cache,
    refuse_pageless,
    uses_interface,
    why_dense,
)
from quantpage.integrations.hf_transformers.modules.latent import attend_to_rows, has_latent_rows
from quantpage.integrations.hf_transformers.pages.memory import Memory
from quantpage.integrations.hf_transformers.steps import cpu, gpu
from quantpage.masks import Mask


@dataclass(slots=True)
class Attached:
    """A model that keeps its cache in quantized pages until ``detach`` or the end of a ``with``."""

    model: nn.Module
    options: CacheOptions
    calibration: str = "none"
    """Where the key maps come from, in words."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def formats(self) -> LayerFormats:
        """The cache format of each layer."""
        return self.options.formats

    @property
    def coverage(self) -> Coverage:
        """Which layers read quantized pages, and why others do not, as far as is known by now."""
        return self.options.ledger.coverage()

    def new_cache(self, memory: Memory | None = None) -> QuantPageCache:
        """An empty cache, for ``generate(past_key_values=...)`` over several calls.

        memory: where its pages go; None: a memory of its own.
        """
        return QuantPageCache(text_config(self.model.config), self.options, memory)

    def prompts(self, max_pages: int | None = None) -> Prompts:
        """Beginnings of prompts that are computed once and found again by their tokens.

        Raises UnsupportedModel where a token's keys depend on later tokens, and for layers with
        another state than keys and values.
        """
        return Prompts(self, max_pages)

    def save_cache(self, cache: QuantPageCache, path: Path | str, note: Any = None) -> None:
        """Write what ``cache`` holds to a file, with a note (JSON) for ``load_with_note``.

        Raises UnsupportedModel for layers with another state than keys and values.
        """
        save_cache(self, cache, path, note)

    def load_cache(self, path: Path | str) -> QuantPageCache:
        """The cache that ``save_cache`` wrote; CorruptCache for another model or format."""
        return load_cache(self, path)[0]

    def load_with_note(self, path: Path | str) -> tuple[QuantPageCache, Any]:
        """``load_cache``, and the note that was saved with it."""
        return load_cache(self, path)

    def detach(self) -> None:
        """Restore the model exactly; calling it again changes nothing."""
        while self._undo:
            # Only then taken off the list: Ctrl-C may come between, and doing it again is harmless.
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> "Attached":
        if not self._undo:
            raise ValueError(
                "attached: expected an attachment that stands, got one that was detached; "
                "quantpage.attach(model, ...) makes another"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


# One more than the house allows: independent options of the one entry, all but two by name.
def attach(  # noqa: PLR0913
    model: nn.Module,
    kv_format: str | KVFormat | LayerFormats = "int8",
    *,
    page_size: int = 64,
    backend: str = "flash",
    mask: Mask | None = None,
    implementation: str | None = None,
    checked: bool = False,
    calibration: str | Path | None = AUTO,
    max_tokens: int | None = None,
) -> Attached:
    """Keep ``model``'s key-value cache in quantized pages.

    model: a Hugging Face decoder. kv_format: a name of FORMATS, keys and values by name
    ("k=int8,v=int4"), one a layer ("int4,first2=int8,layers=7,9-11:int8"), or a KVFormat of one's
    own. page_size: tokens a page. backend: 'flash' or 'flash_mask'.
    mask: who may see whom, instead of the model's causal rule, in layers without a window.
    implementation: of the ops, by name; None: automatic. checked: raise NonFiniteInput before a
    NaN or an infinity is cached. calibration: key maps (docs/key-maps.md): 'auto' measures the
    model on random tokens where its keys have biases or uneven norms, once, in seconds; a file of
    `quantpage calibrate`; 'none' or None: keys as they are. Static formats need such a file, or a
    checkpoint's folder that holds their scales ('auto': the one that the model was loaded from).
    max_tokens: that a row will hold at most; its pages are then allocated once, and more tokens
    raise OutOfPages. None: pages are added as they are needed.

    Use as ``with attach(model, ...):`` and call ``model.generate(...)`` or ``model(...)`` as
    always. Raises UnsupportedModel, FormatError or ValueError before anything is changed.
    """
    if not isinstance(model, PreTrainedModel):
        # Of adapters (peft), around one.
        inner = "; attach its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise UnsupportedModel(
            f"model: expected a Transformers model, got {type(model).__name__}{inner}"
        )
    # What another thread has changed halfway would be taken for the model.
    with _attaching:
        refuse_unsupported(model.config)
        _refuse_attached(model)
        formats = LayerFormats.of(kv_format)
        options = CacheOptions(
            formats=formats,
            page_size=page_size,
            backend=find_backend(backend),
            mask=mask,
            implementation=implementation,
            checked=checked,
            max_tokens=max_tokens,
        )
        refuse_own_cache(model)
        _refuse_compiled(model)
        _refuse_devices(each.device for each in model.parameters())
        caching = caching_modules(model, type(text_config(model.config)))
        options = replace(
            options, own_state=frozenset(index for index, each in caching.items() if crosses(each))
        )
        attached = Attached(model, options)
        # Built once now, so that a format or a layer that cannot be fails before the model changes.
        cache = attached.new_cache()
        _survey(model, cache, caching, options.ledger)
        _refuse_widths(cache, caching)
        if mask is not None:
            _refuse_mask(model, mask, cache, options.ledger)
        _refuse_static_rows(cache, options.ledger)
        maps = find_key_maps(model, cache.formats, calibration, options.ledger.latent)
        _refuse_maps_of_rows(maps, options.ledger)
        attached.options = replace(options, key_maps=maps.layers, static=maps.static)
        attached.calibration = maps.source
        try:
            _install(attached, model, caching)
        except BaseException:
            attached.detach()
            raise
    options.ledger.announce()
    return attached


_attaching = RLock()


def _refuse_attached(model: PreTrainedModel) -> None:
    if any(is_hooked(each) for each in decoders(model)):
        raise ValueError("model: expected a model that is not attached yet; detach it first")
    if any(is_attached(each) for each in attention_configs(model, ())):
        raise ValueError(
            "model: expected a configuration of its own, got one that an attached model has too; "
            "detach that one first, or give this one a copy"
        )


def _install(
    attached: Attached, model: PreTrainedModel, caching: dict[int, list[nn.Module]]
) -> None:
    """Change the model; what takes each change back is noted beside it."""
    options = attached.options
    paged = [module for index in options.ledger.paged for module in caching[index]]
    configs: list[Any] = []
    functions.register()
    if all(uses_interface(module) for module in paged):
        configs = attention_configs(model, paged)
        use_attention(configs, functions.NAME, attached._undo)
        keep_attention(model, configs, functions.NAME, attached._undo)
        for index in options.ledger.latent:
            for module in caching[index]:
                attend_to_rows(module, attached._undo)
    if options.implementation in (None, "cpu"):
        cpu.install(model, attached._undo)
    if options.implementation in (None, "triton", "gluon"):
        gpu.install(model, attached._undo)
    Supply(model, attached.new_cache, options, configs).install(attached._undo)


def _survey(
    model: PreTrainedModel,
    cache: QuantPageCache,
    caching: dict[int, list[nn.Module]],
    ledger: Ledger,
) -> None:
    """Write down what each layer will do; UnsupportedModel where none can have pages."""
    ledger.model, ledger.layers = type(model).__name__, len(cache.layers)
    kinds = getattr(text_config(model.config), "layer_types", None) or []
    for index, layer in enumerate(cache.layers):
        stateless = index < len(kinds) and kinds[index] in ("moe", "mlp")
        if isinstance(layer, PagedLayer) and index in caching:
            ledger.paged.add(index)
            why = why_dense(caching[index])
            if why is not None:
                ledger.dense[index] = why
            elif all(has_latent_rows(module) for module in caching[index]):
                ledger.latent.add(index)
        # Layers that keep nothing (another layer's keys serve them) have no state to name; one that
        # Transformers would give keys, and whose code caches none, keeps something elsewhere.
        if not stateless and (
            hasattr(layer, "conv_states") or index in caching or isinstance(layer, PagedLayer)
        ):
            ledger.own_state.add(index)
        if hasattr(layer, "conv_states"):
            ledger.beside.add(index)
    if not ledger.paged:
        refuse_pageless(model)
    ledger.first = ref(caching[min(ledger.paged)][0])


def _refuse_widths(cache: QuantPageCache, caching: dict[int, list[nn.Module]]) -> None:
    """FormatError where a layer's format does not fit the channels that its attention names."""
    for layer in cache.paged():
        for module in caching.get(layer.index, ()):
            found = [getattr(module, name, None) for name in _widths_named(module)]
            if isinstance(found[0], int):
                value = found[1] if isinstance(found[1], int) else None
                try:
                    CacheLayout(1, found[0], cache.formats[layer.index], value_head_dim=value)
                except FormatError as error:
                    raise FormatError(f"kv_format: layer {layer.index}, {error}") from error


def _refuse_static_rows(cache: QuantPageCache, ledger: Ledger) -> None:
    """FormatError where latent rows would need scales that nothing measures."""
    for index in sorted(ledger.latent):
        if not cache.formats[index].dynamic:
            raise FormatError(
                f"kv_format: expected a format with scales of its own for layer {index}, which "
                f"caches latent rows (MLA), got {cache.formats[index].name}"
            )


def _refuse_maps_of_rows(maps: KeyMaps, ledger: Ledger) -> None:
    """FormatError for a calibration of keys that are not what is cached."""
    found = sorted(ledger.latent & maps.layers.keys())
    if found:
        raise FormatError(
            f"calibration: expected None for layers that cache latent rows (MLA), whose keys are "
            f"not what is cached; got {maps.source} with a map for layer {found[0]}"
        )


def _widths_named(module: nn.Module) -> tuple[str, str]:
    """Where an attention says how wide the keys and values are that it caches."""
    if has_latent_rows(module):
        # One latent for all heads, and the rotary part of the key in the place of the value.
        return "kv_lora_rank", "qk_rope_head_dim"
    return "qk_head_dim" if hasattr(module, "qk_head_dim") else "head_dim", "v_head_dim"


def _refuse_mask(model: PreTrainedModel, mask: Mask, cache: QuantPageCache, ledger: Ledger) -> None:
    """ValueError where a mask that was given cannot be applied in every layer."""
    found = ledger.coverage()
    if found.dense or found.own_state:
        raise ValueError(f"mask: expected a model whose layers all read pages; {found}")
    sliding = [layer.index for layer in cache.paged() if layer.is_sliding]
    if sliding:
        raise ValueError(
            f"mask: expected a model without windows, whose rule a mask would have to replace; "
            f"layers {sliding} have one"
        )
    # Latent rows are one kv_head for all.
    heads, kv_heads = mask.heads, 1 if ledger.latent else model_shape(model.config).kv_heads
    if heads not in (1, kv_heads):
        raise ValueError(f"mask: expected rows for 1 or {kv_heads} kv_heads, got {heads}")


def _refuse_devices(devices: Iterable[torch.device]) -> None:
    """Kernels run on the current GPU, and pages of layers that see alike are on one."""
    there = {each.index or 0 for each in devices if each.type == "cuda"}
    if len(there) > 1:
        raise UnsupportedModel(
            "model: expected weights on one GPU, got "
            + ", ".join(f"cuda:{index}" for index in sorted(there))
            + "; over several a model runs inside vLLM"
        )
    if there and there != {torch.cuda.current_device()}:
        index = next(iter(there))
        raise ValueError(
            f"model: expected weights on the current GPU, cuda:{torch.cuda.current_device()}, got "
            f"cuda:{index}; torch.cuda.set_device({index}) makes it the current one"
        )


def _refuse_compiled(model: PreTrainedModel) -> None:
    """UnsupportedModel where torch.compile holds a forward: it would trace past our hooks."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(forward, "_torchdynamo_orig_callable"):
            raise UnsupportedModel(
                f"model: expected one that is not compiled, got torch.compile around "
                f"{name or type(model).__name__}; compiled after attach() it runs, uncompiled"
            )
