"""Every question about vLLM's version: 0.29 to 0.33.

What is asked is whether a name is there, not a number, as builds of vLLM call themselves by many.
"""

from collections.abc import Sequence
from typing import Any

import torch

from quantpage.errors import Unavailable


def check_supported() -> None:
    """Unavailable where vLLM is older than 0.29, the first whose backends choose their bytes."""
    from vllm.v1 import kv_cache_interface

    if not hasattr(kv_cache_interface, "KVCacheLayout"):
        import vllm

        raise Unavailable(f"vllm: expected 0.29 or later, got {vllm.__version__}")


def on_cpu() -> bool:
    """True where vLLM serves from a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def device() -> torch.device:
    """Where this process keeps its weights and its cache."""
    from vllm.platforms import current_platform

    return torch.device(current_platform.device_type)


def skips_layers(config: Any) -> bool:
    """Whether --kv-cache-dtype-skip-layers leaves some out."""
    return bool(getattr(config.cache_config, "kv_cache_dtype_skip_layers", None))


def drafts_by_model(config: Any) -> bool:
    """Whether drafts come from layers that have a cache too, and not from the text itself."""
    asked = config.speculative_config
    if asked is None:
        return False
    return any(getattr(asked, each, bool)() for each in ("use_eagle", "uses_draft_model"))


def runs_first_steps(config: Any) -> bool:
    """Whether vLLM runs steps over its cache before the first request: to warm kernels up (its
    newer runner), or before it captures graphs."""
    from vllm.config import CUDAGraphMode

    warms = getattr(config.kernel_config, "enable_jit_warmup", False)
    captures = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return captures or bool(warms and getattr(config, "use_v2_model_runner", False))


def tensor_parallel() -> tuple[int, int]:
    """This worker's rank among those that share a layer's heads, and how many they are."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def layer_index(name: str) -> int:
    """The number of a layer in its name."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def backend_name() -> str:
    """The member of vLLM's table of backends that stands for ours."""
    return "CPU_ATTN" if on_cpu() else "CUSTOM"


def register_attention(path: str) -> None:
    """Make ``path`` what --attention-backend CUSTOM means."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, path)
    if on_cpu():
        # Its platform knows one backend by name, and takes an override of it.
        register_backend(AttentionBackendEnum.CPU_ATTN, path)


def takes_own_names() -> bool:
    """From 0.33 on a plugin may bring names for --kv-cache-dtype."""
    from vllm.config import cache

    return hasattr(cache, "register_kv_cache_dtype")


def register_names(names: Sequence[str]) -> None:
    """Make ``names`` values of --kv-cache-dtype, where vLLM takes any."""
    if not takes_own_names():
        return
    from vllm.config.cache import register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    for each in names:

        class Handler:
            """Bytes, whose meaning is the backend's business."""

            name = each

            def torch_dtype(self) -> torch.dtype:
                """What a cache's memory is seen as."""
                return torch.uint8

            def quant_mode(self):
                """None of vLLM's own."""
                return KVQuantMode.CUSTOM

        register_kv_cache_dtype(each)(Handler)


def holds_exact_pages() -> bool:
    """From 0.32 on a spec can say by which page its blocks are cut, which exact pages need."""
    from vllm.v1.kv_cache_interface import KVCacheSpec

    # 0.31 has the field, of bytes alone.
    return hasattr(KVCacheSpec, "get_block_stride_alignment")
