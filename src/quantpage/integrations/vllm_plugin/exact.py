"""Exact pages in vLLM's own memory: more cache groups, allocated, freed, shared and hit by vLLM.

Beside each attention layer stands one that computes nothing (``exact_layer``). Its spec says: a
window of a page and the token's own, and the first page, for as long as the layer's own window, if
it has one, shows it. vLLM's scheduler then gives every request such pages from the same pool of
blocks, frees those that fell out of the window, counts them for admission, preempts with them, and
hits a cached prefix only where they are cached too: a hit is as exact as a cold start.

Of a long chunk of a prompt only those pages are taken that somebody reads after its step: the first
one, those at whose end a prefix can be hit, and those that the next tokens see. The step itself
runs in pages of its own (``working``), for one layer at a time. Else 8,192 tokens would hold 128
pages in every layer until their step ends: 1.07 GB in 32 layers of 8 heads, where 36 pages do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from quantpage.integrations.vllm_plugin.formats import LONG_CHUNK


def window_of(page: int) -> int:
    """Tokens, the query's own counted, whose pages are the query's own and the one before."""
    return page + 1


@dataclass(frozen=True, kw_only=True)
class ExactPagesSpec(SlidingWindowSpec):
    """The first page, while it is seen, and the last two of each request."""

    layer_window: int = 0
    """Tokens that a query of the layer sees, its own counted; 0: all before it. (``sliding_window``
    is that of the last two pages.)"""
    hit_tokens: int = 0
    """A prefix can be hit at multiples of this; 0: none can."""
    drafts: int = 0
    """The newest tokens of a step that may be taken back after it."""
    steps: int = 1
    """That may be under way at once."""

    num_retained_tokens = 0
    """0.33's runner for GPUs writes the null page over all that lies further back than this, which
    the first page does; 0: it leaves tables as they are."""

    @property
    def page(self) -> int:
        """Tokens of an exact page. A block may be several: vLLM makes it larger for layers of a
        model whose other layers' blocks have more bytes."""
        return self.sliding_window - 1

    def sees_first(self, computed: int) -> bool:
        """Whether a query behind ``computed`` tokens sees any of the first page."""
        return not self.layer_window or computed - self.layer_window + 1 < self.page

    def max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len):
        """Most pages that a request holds at once."""
        page, tokens = self.block_size, min(max_in_flight_tokens, max_model_len)
        every = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        # With drafts of a model's own a hit looks one page further.
        each = 2 if self.drafts else 1
        hits = 0
        if self.hit_tokens:
            hits = each * (tokens // max(self.hit_tokens, each * page) + 1)
        # A short chunk's pages, or those that the end of a long one leaves to the next tokens; of
        # the steps under way, and of the one before.
        ends = max(-(-LONG_CHUNK // page) + 1, 3) + -(-2 * self.drafts // page)
        return 1 + min(every, hits + (self.steps + 1) * ends)


class ExactPagesManager(SlidingWindowManager):
    """A sliding window that keeps block 0 while it is seen, and leaves out what one step reads."""

    def __init__(self, kv_cache_spec, **named) -> None:
        super().__init__(kv_cache_spec, **named)
        self._given_back: dict[str, int] = {}
        """Request -> its first page, but for the first of all, that may still be held."""

    def remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None):
        """Give back what fell out of the window; the first page when no query sees it any more."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        first, end = self._given_back.get(request_id, 1), min(skipped, len(blocks))
        gone = range(first, end)
        if end > 0 and not self.kv_cache_spec.sees_first(processed_computed_tokens):
            gone = range(0 if not blocks[0].is_null else first, end)
        if not gone:
            return
        # The newest first, as vLLM does: what is freed last is evicted last.
        freed = [blocks[at] for at in reversed(gone) if not blocks[at].is_null]
        blocks[gone.start : end] = [self._null_block] * len(gone)
        self._given_back[request_id] = max(first, end)
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id):
        """All that a request holds; nothing of it is remembered."""
        self._given_back.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **named
    ):
        """A window's hit whose request's first page is cached too, if it is seen; else none."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **named
        )
        if not length or not kv_cache_spec.sees_first(length):
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
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens,
        num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=False, **named,
    ):  # fmt: skip
        """Pages that ``allocate_new_blocks`` will take, and those of a hit that nobody holds."""
        held = len(self.req_to_blocks.get(request_id, ()))
        skipped = 0
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        first = max(skipped, held + len(new_computed_blocks))
        need = sum(self._taken(first, num_tokens, num_tokens_main_model))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            need = min(need, self.max_admission_blocks_per_request)
        # The first page of a hit may have to be taken from the eviction queue too.
        hit = [*new_computed_blocks[max(skipped - held, 0) :]]
        if skipped > held:
            hit += new_computed_blocks[:1]
        return need + self._get_num_evictable_blocks(hit)

    def allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model):
        """Pages for ``num_tokens`` tokens; the null page where only the step under way reads."""
        blocks = self.req_to_blocks[request_id]
        taken = self._taken(len(blocks), num_tokens, num_tokens_main_model)
        fresh = iter(self.block_pool.get_new_blocks(sum(taken)))
        made = [next(fresh) if each else self._null_block for each in taken]
        if self._record_new_block_ids:
            self.new_block_ids.extend(each.block_id for each in made if not each.is_null)
        blocks.extend(made)
        return made

    def _taken(self, first: int, num_tokens: int, num_tokens_main_model: int) -> list[bool]:
        """Which pages from ``first`` on are taken for a request of ``num_tokens`` tokens.

        num_tokens_main_model: without those that a draft may need.
        """
        page = self.block_size
        end = max(-(-num_tokens // page), first)
        drafted = -(-(num_tokens - num_tokens_main_model) // page)
        if (end - first - drafted) * page <= LONG_CHUNK:
            return [True] * (end - first)
        seen = (num_tokens_main_model - self.kv_cache_spec.drafts) // page - 1
        hit: Sequence[bool] | None = [False] * (end - first)
        if self.enable_caching:
            hit = self.reachable_block_mask(
                start_block=first,
                end_block=end,
                alignment_tokens=self.cache_hit_alignment_tokens,
                kv_cache_spec=self.kv_cache_spec,
                use_eagle=self.use_eagle,
            )
        if hit is None:
            return [True] * (end - first)
        return [at == 0 or at >= seen or known for at, known in enumerate(hit, first)]

    @classmethod
    def reachable_block_mask(cls, start_block, *args, **named):
        """Which of a request's pages a later hit can need: a window's, and the first."""
        mask = super().reachable_block_mask(start_block, *args, **named)
        if mask and start_block == 0:
            mask[0] = True
        return mask


def register() -> None:
    """Tell vLLM who manages such pages; once a process is enough."""
    # vLLM registers its own kinds only into an empty table: theirs first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactPagesSpec, ExactPagesManager, ExactPagesSpec)
