"""The layer that stands for another's exact pages: it owns their memory and computes nothing."""

from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from quantpage.integrations.vllm_plugin import compat
from quantpage.integrations.vllm_plugin.exact import ExactPagesSpec, window_of
from quantpage.integrations.vllm_plugin.formats import EXACT_PAGES

SUFFIX = ".quantpage_exact"


@dataclass(frozen=True, eq=False)
class ExactStep:
    """Where a step's exact pages of one cache group are."""

    page_table: torch.Tensor
    """[requests, max_pages]"""
    slots: torch.Tensor
    """[tokens or more]"""


class ExactBuilder(AttentionMetadataBuilder[ExactStep]):
    """Hands tables on."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        # Abstract in vLLM, for all that it sets everything.
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        """The tables of this group."""
        given = common_attn_metadata
        return ExactStep(given.block_table_tensor, given.slot_mapping)


class ExactImpl(AttentionImpl):
    """Never called."""

    def __init__(self) -> None:
        """Nothing to know."""

    def forward(self, *args, **named):
        """No model calls it."""
        raise NotImplementedError("layers of exact pages compute nothing")


class ExactBackend(AttentionBackend):
    """The companion layers' backend."""

    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's table of backends."""
        return compat.backend_name()

    @staticmethod
    def get_impl_cls():
        """Never called."""
        return ExactImpl

    @staticmethod
    def get_builder_cls():
        """Of a step's tables."""
        return ExactBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        """An exact page."""
        return list(EXACT_PAGES[::-1]) if kv_cache_spec is None else [kv_cache_spec.page]

    @classmethod
    def supported_kv_cache_layouts(cls):
        """Whole cells, as those of codes."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """The window of ``ExactPagesSpec``."""
        return True


class ExactPagesLayer(AttentionLayerBase):
    """Owns a cache and computes nothing."""

    def __init__(self, beside, widths: tuple[int, int], page: int, token_bytes: int):
        """token_bytes: of a token and kv_head in an exact page."""
        self.num_heads = 0
        self.beside, self.widths, self.page, self.token_bytes = beside, widths, page, token_bytes
        self.kv_cache = torch.tensor([])
        self.impl = ExactImpl()

    def get_attn_backend(self):
        """Tables only."""
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config):
        """The memory of ``beside``'s exact pages."""
        # Bytes to vLLM, of the same kind as the codes beside: with two kinds it zeroes every new
        # block, which we do not need, and which its CPU runner does at the wrong address where
        # blocks are split into kernel blocks (cpu_model_runner._zero_block_ids, 0.32 and 0.33).
        codes = self.beside.get_kv_cache_spec(vllm_config)
        return ExactPagesSpec(
            block_size=self.page,
            num_kv_heads=codes.num_kv_heads,
            head_size=self.widths[0],
            head_size_v=self.widths[1],
            dtype=codes.dtype,
            kv_quant_mode=codes.kv_quant_mode,
            state_content_bytes=self.token_bytes,
            sliding_window=window_of(self.page),
            layer_window=self.beside.sliding_window or 0,
            hit_tokens=codes.block_size if vllm_config.cache_config.enable_prefix_caching else 0,
            drafts=vllm_config.num_speculative_tokens,
            steps=vllm_config.max_concurrent_batches,
        )
