"""Exact pages in vLLM's own memory: a second cache group, allocated, freed, shared and hit by vLLM.

Beside each attention layer stands one that computes nothing. Its spec says: a window of the last
two pages, and the first page. vLLM's scheduler then gives every request such pages from the same
pool of blocks, frees those that fell out of the window, counts them for admission, preempts with
them, and hits a cached prefix only where they are cached too: a hit is as exact as a cold start.
"""

from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheLayout, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from quantpage.integrations.vllm_plugin import compat
from quantpage.integrations.vllm_plugin.formats import EXACT_PAGES

SUFFIX = ".quantpage_exact"


@dataclass(frozen=True, kw_only=True)
class ExactPagesSpec(SlidingWindowSpec):
    """The first page and the last two of each request, in the model's dtype."""

    num_retained_tokens = 0
    """0.33's runner for GPUs writes the null page over all that lies further back than this, which
    the first page does; 0: it leaves tables as they are."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len):
        """One more than the window's: the first."""
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + 1


class ExactPagesManager(SlidingWindowManager):
    """A sliding window that never lets go of block 0."""

    def remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None):
        """Give back what fell out of the window, from the second page on."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, 1, skipped)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **named
    ):
        """A window's hit whose request's first page is cached too; else none."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **named
        )
        if not length:
            return found, length
        from vllm.v1.core.kv_cache_utils import resolve_block_hashes

        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=named.get("alignment_tokens", kv_cache_spec.block_size),
        )
        first = block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if not first:
            return tuple([] for _ in kv_cache_group_ids), 0
        for blocks, block in zip(found, first, strict=True):
            blocks[0] = block
        return found, length

    def add_local_computed_blocks(
        self,
        request_id,
        new_computed_blocks,
        num_local_computed_tokens,
        num_external_computed_tokens,
    ):
        """Take a hit's pages; the first one too, which the window alone would leave out."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        held = self.req_to_blocks[request_id]
        null, blocks = self._null_block, new_computed_blocks
        if blocks and held and held[0] is null and blocks[0] is not null:
            self.block_pool.touch([blocks[0]])
            held[0] = blocks[0]

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, *args, **named
    ):
        """A window's, and the first page of a hit."""
        need = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **named
        )
        # Block 0 of a hit may have to be taken from the eviction queue too.
        return need + self._get_num_evictable_blocks(new_computed_blocks[:1])

    @classmethod
    def reachable_block_mask(cls, start_block, *args, **named):
        """Which of a request's pages a later hit can need: a window's, and the first."""
        mask = super().reachable_block_mask(start_block, *args, **named)
        if mask and start_block == 0:
            mask[0] = True
        return mask


@dataclass
class ExactStep:
    """Where a step's exact pages are."""

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
        """One exact page a block."""
        return list(EXACT_PAGES[::-1]) if kv_cache_spec is None else [kv_cache_spec.block_size]

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

    def __init__(self, beside, widths: tuple[int, int], dtype: torch.dtype, page: int):
        self.num_heads = 0
        self.beside, self.widths, self.dtype, self.page = beside, widths, dtype, page
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
            state_content_bytes=sum(self.widths) * self.dtype.itemsize,
            sliding_window=2 * self.page,
        )


def register() -> None:
    """Tell vLLM who manages such pages; once a process is enough."""
    # vLLM registers its own kinds only into an empty table: theirs first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactPagesSpec, ExactPagesManager, ExactPagesSpec)
