"""Which exact pages vLLM's scheduler holds for a request, and what it counts of them beforehand."""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool

from quantpage.integrations.vllm_plugin.exact import (
    ExactPagesManager,
    ExactPagesSpec,
    window_of,
)
from quantpage.integrations.vllm_plugin.formats import LONG_CHUNK

pytestmark = pytest.mark.cpu
PAGE, LONGEST = 64, 65536


def manager(
    *, hits: int = 256, drafts: int = 0, steps: int = 1, chunk: int = 8192, window: int = 0
):
    spec = ExactPagesSpec(
        block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.int8, hit_tokens=hits,
        sliding_window=window_of(PAGE), drafts=drafts, steps=steps, layer_window=window,
    )  # fmt: skip
    pool = BlockPool(2000, bool(hits), PAGE)
    made = ExactPagesManager(
        spec,
        block_pool=pool,
        enable_caching=bool(hits),
        kv_cache_group_id=0,
        scheduler_block_size=hits or 256,
        max_admission_blocks_per_request=spec.max_admission_blocks_per_request(
            steps * chunk, LONGEST
        ),
    )
    made.use_eagle = bool(drafts)
    return made, pool


def schedule(made, pool, *, done: int, settled: int, new: int, drafts: int = 0) -> int:
    """As KVCacheManager.allocate_slots does; the pages that the request holds then."""
    made.remove_skipped_blocks("r", settled)
    slots, tokens = done + new + drafts, done + new
    need = made.get_num_blocks_to_allocate("r", slots, (), done, done, tokens)
    free = pool.get_num_free_blocks()
    made.allocate_new_blocks("r", slots, tokens)
    made.num_cached_block.setdefault("r", 0)
    assert free - pool.get_num_free_blocks() == need
    return sum(not each.is_null for each in made.req_to_blocks["r"])


def pages_there(made, first: int, end: int) -> bool:
    return all(not each.is_null for each in made.req_to_blocks["r"][first:end])


@pytest.mark.parametrize(
    ("options", "most"), [({}, 35), ({"hits": 0}, 3), ({"hits": 128}, 67), ({"hits": 64}, 131)]
)
def test_a_long_chunk_holds_what_is_read_after_it(options, most):
    made, pool = manager(**options)
    held = [schedule(made, pool, done=at, settled=at, new=8192) for at in range(0, LONGEST, 8192)]
    assert max(held) <= most <= made.max_admission_blocks_per_request
    # Where a prefix can be hit its last page is there, until the window leaves it.
    if options.get("hits", 256):
        every = options.get("hits", 256) // PAGE
        last = made.req_to_blocks["r"][-8192 // PAGE :]
        assert not any(each.is_null for each in last[every - 1 :: every])
    made.free("r")
    assert pool.get_num_free_blocks() == 1999 and not made._given_back


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafts", (0, 5))
@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("window", (0, 30, 65, 1000))
def test_no_step_misses_a_page(seed, drafts, steps, window):
    """Chunks of any length, steps under way, drafts that are taken back: a step of few tokens has
    all pages it reads or writes, a long one those of before; no more are held than admitted."""
    draw = random.Random(seed)
    made, pool = manager(drafts=drafts, steps=steps, chunk=2048, window=window)
    done, under_way = 0, [0] * steps
    while done < 20000:
        new = draw.choice((1, 1 + drafts, 20, 63, LONG_CHUNK, LONG_CHUNK + 1, 300, 1000, 2048))
        held = schedule(made, pool, done=done, settled=under_way[0], new=new, drafts=drafts)
        assert held <= made.max_admission_blocks_per_request
        before = max(done // PAGE - 1, 0)
        assert pages_there(made, before, -(-done // PAGE))
        # The first page, for as long as a query sees its last token; what is settled cannot return.
        if not window or done - window < PAGE - 1:
            assert pages_there(made, 0, 1)
        elif under_way[0] - window >= PAGE - 1 and under_way[0] >= 2 * PAGE:
            assert not pages_there(made, 0, 1)
        if new <= LONG_CHUNK:
            assert pages_there(made, before, -(-(done + new) // PAGE))
        # The newest tokens may be drafts that were wrong.
        done += new - (draw.randint(0, min(drafts, new - 1)) if drafts else 0)
        under_way = [*under_way[1:], done]
    made.free("r")
    assert pool.get_num_free_blocks() == 1999


def hit(made, pool, tokens: int) -> int:
    """How many of ``tokens`` a request finds that has the same ones."""
    blocks, length = made.find_longest_cache_hit(
        block_hashes=HASHES,
        max_length=tokens,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=made.kv_cache_spec,
        drop_eagle_block=False,
        alignment_tokens=256,
    )
    seen = length // PAGE - 1
    assert not length or not blocks[0][seen].is_null
    assert not length or not made.kv_cache_spec.sees_first(length) or not blocks[0][0].is_null
    return length


HASHES = [bytes([i]) * 32 for i in range(64)]


@pytest.mark.parametrize(("window", "least"), [(0, 4096), (100, 256), (600, 768)])
def test_a_hit_needs_the_first_page_only_where_it_is_seen(window, least):
    """least: the shortest hit of whole blocks of 256 behind which nobody sees the first page."""
    made, pool = manager(window=window)
    schedule(made, pool, done=0, settled=0, new=2048)
    blocks = made.req_to_blocks["r"]
    pool.cache_full_blocks(
        SimpleNamespace(block_hashes=HASHES), blocks, 0, 2048 // PAGE, PAGE, kv_cache_group_id=0
    )
    first = blocks[0]
    assert [hit(made, pool, tokens) for tokens in (2048, 600, 300)] == [2048, 512, 256]
    made.free("r")
    # Somebody else takes the page.
    pool._maybe_evict_cached_block(first)
    assert [hit(made, pool, tokens) for tokens in (2048, 600, 300)] == [
        tokens if tokens >= least else 0 for tokens in (2048, 512, 256)
    ]
