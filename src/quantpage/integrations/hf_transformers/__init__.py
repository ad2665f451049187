"""Any Hugging Face decoder over quantized pages.

    with quantpage.attach(model, kv_format="int8"):
        model.generate(...)

Three hooks that Transformers offers are used: a cache class (cache), an attention function with
its mask function (hooks/functions), and a forward pre-hook that supplies the cache (hooks/supply).

attach    the door: what is chosen once, put on a model and taken off again
sizes     a cache counted by the configuration, before anything is loaded
keys      what was measured of keys, or stands in a checkpoint: key maps and static scales
steps     quicker ways through a step: the CPU's core, one launch where there were many, CUDA graphs
hooks     what the model calls: attention, masks, the cache of a forward; its own where ours cannot
cache     the cache that Transformers sees, its layers, and prompts that are remembered
modules   a model's modules, read: which are Llama's, which expand latent rows, what a digest is of
pages     under the cache: memory, rows, padding, one step
loading   a folder or an id in the hub to a model, or one sentence why not

A room imports those below it, never those above (``pyproject.toml``).
"""

from quantpage.integrations.hf_transformers.attach import Attached, attach
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.prompts import Prompts
from quantpage.integrations.hf_transformers.keys.calibration import calibrate
from quantpage.integrations.hf_transformers.modules.coverage import Coverage

__all__ = ["Attached", "Coverage", "Prompts", "QuantPageCache", "attach", "calibrate"]
