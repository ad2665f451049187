"""Attaching quantized pages to a Transformers model, and taking them off again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.attention import find_backend
from quantpage.errors import UnsupportedModel
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers import cpu_step, functions
from quantpage.integrations.hf_transformers.cache import CacheOptions, QuantPageCache
from quantpage.integrations.hf_transformers.memory import Memory
from quantpage.integrations.hf_transformers.model import refuse_unsupported, text_config
from quantpage.integrations.hf_transformers.prompts import Prompts, load_cache, save_cache
from quantpage.integrations.hf_transformers.supply import Supply
from quantpage.masks import Mask


@dataclass(slots=True)
class Attached:
    """A model that keeps its cache in quantized pages until ``detach`` or the end of a ``with``."""

    model: nn.Module
    options: CacheOptions
    _undo: list[Any] = field(default_factory=list)

    @property
    def formats(self) -> LayerFormats:
        """The cache format of each layer."""
        return self.options.formats

    def new_cache(self, memory: Memory | None = None) -> QuantPageCache:
        """An empty cache, for ``generate(past_key_values=...)`` over several calls.

        memory: where its pages go; None: a memory of its own.
        """
        return QuantPageCache(text_config(self.model.config), self.options, memory)

    def prompts(self, max_pages: int | None = None) -> Prompts:
        """Beginnings of prompts that are computed once and found again by their tokens."""
        return Prompts(self, max_pages)

    def save_cache(self, cache: QuantPageCache, path: Path | str) -> None:
        """Write what ``cache`` holds to a file."""
        save_cache(self, cache, path)

    def load_cache(self, path: Path | str) -> QuantPageCache:
        """The cache that ``save_cache`` wrote; CorruptCache for another model or format."""
        return load_cache(self, path)

    def detach(self) -> None:
        """Restore the model exactly; calling it again changes nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    model: nn.Module,
    kv_format: str = "int8",
    *,
    page_size: int = 64,
    backend: str = "flash",
    mask: Mask | None = None,
    implementation: str | None = None,
    checked: bool = False,
) -> Attached:
    """Keep ``model``'s key-value cache in quantized pages.

    model: a Hugging Face decoder. kv_format: a name of FORMATS, or one a layer
    ("int4,first2=int8,last1=int8"). page_size: tokens a page. backend: 'flash' or 'flash_mask'.
    mask: who may see whom, instead of the model's causal rule, in layers without a window.
    implementation: of the ops, by name; None: automatic. checked: raise NonFiniteInput before a
    NaN or an infinity is cached.

    Use as ``with attach(model, ...):`` and call ``model.generate(...)`` or ``model(...)`` as
    always. Raises UnsupportedModel, FormatError or ValueError before anything is changed.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model: expected a Transformers model, got {type(model).__name__}")
    if model.config._attn_implementation == functions.NAME:
        raise ValueError("model: expected a model that is not attached yet; detach it first")
    refuse_unsupported(model.config)
    formats = LayerFormats.parse(kv_format)
    formats.refuse_static()
    options = CacheOptions(
        formats=formats,
        page_size=page_size,
        backend=find_backend(backend),
        mask=mask,
        implementation=implementation,
        checked=checked,
    )
    attached = Attached(model, options)
    # Built once now, so that a format or a layer that cannot be fails before the model changes.
    attached.new_cache()
    functions.register()
    _use_our_attention(model, attached._undo)
    if implementation in (None, "cpu"):
        cpu_step.install(model, attached._undo)
    Supply(model, attached.new_cache).install(attached._undo)
    return attached


def _use_our_attention(model: PreTrainedModel, undo: list[Any]) -> None:
    """Name our attention function in every configuration, remembering what was there.

    A model with its own table of attention classes (no attention interface) keeps its own: it
    reads the cache through LazyKV, which dequantizes.
    """
    if not model._can_set_attn_implementation():
        return
    configs = {id(model.config): model.config}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs[id(module.config)] = module.config
            for name in getattr(module.config, "sub_configs", {}):
                sub = getattr(module.config, name, None)
                if sub is not None:
                    configs[id(sub)] = sub
    before = [(each, each._attn_implementation_internal) for each in configs.values()]

    def restore() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    undo.append(restore)
    model.set_attn_implementation(functions.NAME)
