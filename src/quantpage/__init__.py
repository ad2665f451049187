"""QuantPage: attention over quantized pages.

    import quantpage
    with quantpage.attach(model, kv_format="int8"):
        model.generate(...)

Names are loaded when first used, so that importing quantpage starts no CUDA and imports neither
triton nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What a type checker and an editor see; the names below are loaded when first used.
    from quantpage import cache as cache
    from quantpage import engine as engine
    from quantpage import errors as errors
    from quantpage import formats as formats
    from quantpage import masks as masks
    from quantpage.attention import BACKENDS as BACKENDS
    from quantpage.attention import Attended as Attended
    from quantpage.attention import LayerAttention as LayerAttention
    from quantpage.attention import build_attention as build_attention
    from quantpage.attention import find_backend as find_backend
    from quantpage.batch import BatchPlan as BatchPlan
    from quantpage.batch import plan_batch as plan_batch
    from quantpage.batch import plan_on_device as plan_on_device
    from quantpage.bound import BoundAttention as BoundAttention
    from quantpage.bound import CurrentStep as CurrentStep
    from quantpage.cache import CacheLayout as CacheLayout
    from quantpage.cache import LayerKV as LayerKV
    from quantpage.cache import PagedKVCache as PagedKVCache
    from quantpage.cache import QuantizedPages as QuantizedPages
    from quantpage.errors import QuantPageError as QuantPageError
    from quantpage.formats import FORMATS as FORMATS
    from quantpage.formats import KVFormat as KVFormat
    from quantpage.formats import find_format as find_format
    from quantpage.formats.per_layer import LayerFormats as LayerFormats
    from quantpage.hardware import device_info as device_info
    from quantpage.integrations.hf_transformers import Attached as Attached
    from quantpage.integrations.hf_transformers import Coverage as Coverage
    from quantpage.integrations.hf_transformers import Prompts as Prompts
    from quantpage.integrations.hf_transformers import QuantPageCache as QuantPageCache
    from quantpage.integrations.hf_transformers import attach as attach
    from quantpage.integrations.hf_transformers.loading.model import load_model as load_model
    from quantpage.integrations.hf_transformers.sizes import cache_shape as cache_shape
    from quantpage.masks import CausalMask as CausalMask
    from quantpage.masks import FullMask as FullMask
    from quantpage.ops.attend import AttendParams as AttendParams
    from quantpage.ops.attend import attend as attend
    from quantpage.ops.dispatch import Call as Call
    from quantpage.ops.gather import gather as gather
    from quantpage.ops.rope_write import WriteParams as WriteParams
    from quantpage.ops.rope_write import rope_write as rope_write
    from quantpage.rope import rope_table as rope_table

__version__ = "0.1.0"

_PUBLIC = {
    "AttendParams": "quantpage.ops.attend",
    "Attached": "quantpage.integrations.hf_transformers",
    "Attended": "quantpage.attention",
    "BACKENDS": "quantpage.attention",
    "BatchPlan": "quantpage.batch",
    "BoundAttention": "quantpage.bound",
    "Call": "quantpage.ops.dispatch",
    "CacheLayout": "quantpage.cache",
    "CausalMask": "quantpage.masks",
    "Coverage": "quantpage.integrations.hf_transformers",
    "CurrentStep": "quantpage.bound",
    "FORMATS": "quantpage.formats",
    "FullMask": "quantpage.masks",
    "KVFormat": "quantpage.formats",
    "LayerAttention": "quantpage.attention",
    "LayerFormats": "quantpage.formats.per_layer",
    "LayerKV": "quantpage.cache",
    "PagedKVCache": "quantpage.cache",
    "Prompts": "quantpage.integrations.hf_transformers",
    "QuantPageCache": "quantpage.integrations.hf_transformers",
    "QuantPageError": "quantpage.errors",
    "QuantizedPages": "quantpage.cache",
    "WriteParams": "quantpage.ops.rope_write",
    "attach": "quantpage.integrations.hf_transformers",
    "attend": "quantpage.ops.attend",
    "build_attention": "quantpage.attention",
    "cache_shape": "quantpage.integrations.hf_transformers.sizes",
    "device_info": "quantpage.hardware",
    "find_backend": "quantpage.attention",
    "find_format": "quantpage.formats",
    "gather": "quantpage.ops.gather",
    "load_model": "quantpage.integrations.hf_transformers.loading.model",
    "plan_batch": "quantpage.batch",
    "plan_on_device": "quantpage.batch",
    "rope_table": "quantpage.rope",
    "rope_write": "quantpage.ops.rope_write",
}

_PACKAGES = frozenset(["cache", "engine", "errors", "formats", "masks"])
"""Found as ``quantpage.masks.causal`` too, with no import of their own."""

__all__ = sorted(["__version__", *_PUBLIC])


def _load(name: str) -> Any:
    if name in _PUBLIC or name in _PACKAGES:
        try:
            if name in _PACKAGES:
                return import_module(f"quantpage.{name}")
            return getattr(import_module(_PUBLIC[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            message = f"quantpage.{name} needs transformers: pip install 'quantpage[transformers]'"
            raise ModuleNotFoundError(message, name=error.name) from error
    raise AttributeError(f"module 'quantpage' has no attribute {name!r}")


if not TYPE_CHECKING:
    # To a type checker a name that is not imported above is an error, and no Any.
    __getattr__ = _load


def __dir__() -> list[str]:
    return __all__
