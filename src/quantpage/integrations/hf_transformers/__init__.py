"""Any Hugging Face decoder over quantized pages.

    with quantpage.attach(model, kv_format="int8"):
        model.generate(...)

Three hooks that Transformers offers are used: a cache class (cache), an attention function with
its mask function (functions), and a forward pre-hook that supplies the cache (attach).
"""

from quantpage.integrations.hf_transformers.attach import Attached, attach
from quantpage.integrations.hf_transformers.cache import QuantPageCache
from quantpage.integrations.hf_transformers.coverage import Coverage
from quantpage.integrations.hf_transformers.prompts import Prompts

__all__ = ["Attached", "Coverage", "Prompts", "QuantPageCache", "attach"]
