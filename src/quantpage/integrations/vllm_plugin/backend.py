"""What vLLM asks of a backend before it has made a layer: names, sizes, bytes."""

from dataclasses import replace

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from quantpage.formats import KVFormat
from quantpage.integrations.vllm_plugin import compat
from quantpage.integrations.vllm_plugin.formats import NAMES, exact_page, token_bytes
from quantpage.integrations.vllm_plugin.impl import QuantPageImpl, Served
from quantpage.integrations.vllm_plugin.step import StepBuilder, is_probe, kernel_pages


class QuantPageBackend(AttentionBackend):
    """Attention over quantized pages."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = list(NAMES)  # noqa: RUF012
    # One launch writes keys and values and turns the queries into the basis of the cache.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's table of backends."""
        return compat.backend_name()

    @staticmethod
    def get_impl_cls():
        """Of one layer."""
        return QuantPageImpl

    @staticmethod
    def get_builder_cls():
        """Of a step's metadata."""
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        """Tokens of a page; vLLM cuts its blocks into such."""
        return kernel_pages(kv_cache_spec)

    @classmethod
    def supported_kv_cache_layouts(cls):
        """Whole cells: the bytes of a block and head side by side."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """In causal steps."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Logits that take part in the softmax."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Drafts that see each other."""
        return True

    @classmethod
    def customize_spec(cls, spec):
        """``spec`` with our bytes a token and head, and the page that kernels see."""
        served = Served.last
        if served is None or spec.kv_quant_mode == 0 or spec.state_content_bytes is not None:
            return spec
        form: KVFormat = served.form
        widths = (spec.head_size, spec.head_size_v)
        spec = replace(spec, state_content_bytes=token_bytes(form, widths, served.dtype))
        if form.exact_pages is None:
            return spec
        block = served.block_size if is_probe(spec) else spec.block_size
        page = exact_page(form, block, widths, served.dtype)
        return replace(spec, block_stride_alignment=MultipleOf(page))
