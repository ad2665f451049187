"""QuantPage: attention over quantized pages.

    import quantpage
    with quantpage.attach(model, kv_format="int8"):
        model.generate(...)

Names are loaded when first used, so that importing quantpage starts no CUDA and imports neither
triton nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AttendParams": "quantpage.ops.attend",
    "BACKENDS": "quantpage.attention",
    "BatchPlan": "quantpage.batch",
    "CacheLayout": "quantpage.cache",
    "CausalMask": "quantpage.masks",
    "FORMATS": "quantpage.formats",
    "FullMask": "quantpage.masks",
    "KVFormat": "quantpage.formats",
    "LayerFormats": "quantpage.formats.per_layer",
    "LayerKV": "quantpage.cache",
    "PagedKVCache": "quantpage.cache",
    "QuantPageCache": "quantpage.integrations.hf_transformers",
    "QuantPageError": "quantpage.errors",
    "QuantizedPages": "quantpage.cache",
    "WriteParams": "quantpage.ops.rope_write",
    "attach": "quantpage.integrations.hf_transformers",
    "build": "quantpage.attention",
    "find_backend": "quantpage.attention",
    "find_format": "quantpage.formats",
    "plan_batch": "quantpage.batch",
    "rope_table": "quantpage.rope",
}

__all__ = sorted(["__version__", *_PUBLIC])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'quantpage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
