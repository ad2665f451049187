"""Any Hugging Face decoder over quantized pages.

    with quantpage.attach(model, kv_format="int8"):
        model.generate(...)

Three hooks that Transformers offers are used: a cache class (cache), an attention function with
its mask function (functions), and a forward pre-hook that supplies the cache (supply).

the attached model  attach begins; supply, functions, arguments, own (where pages are not read),
                    coverage (which layers do)
its cache           cache, paged_layer, lazy; latent and hybrid layers; prompts that are remembered
under the cache     rows, padding, step, memory, turns (threads, interruption), saved_rows (files)
quicker steps       cpu_step, gpu_step, graph; llama_like says where they fit
loading             model begins; checkpoint, hub, gguf_tokenizer, digest (which model a file is of)
before loading      sizes counts a cache by the configuration, on a skeleton
keys, measured      key_maps begins; calibration, statistics, measured, watch, checkpoint_scales
"""

from quantpage.integrations.hf_transformers.attach import Attached, attach
from quantpage.integrations.hf_transformers.cache import QuantPageCache
from quantpage.integrations.hf_transformers.coverage import Coverage
from quantpage.integrations.hf_transformers.prompts import Prompts

__all__ = ["Attached", "Coverage", "Prompts", "QuantPageCache", "attach"]
