"""A request on its way: cold, warm, chunked, forked, swapped and reloaded give the same numbers."""

import pytest
import torch

from quantpage.cache import PagedKVCache, PrefixCache
from quantpage.formats import FORMATS
from tests.one_layer import PAGE, TOKENS, Engine, close

pytestmark = pytest.mark.cpu

DYNAMIC = [name for name, each in FORMATS.items() if each.dynamic]


@pytest.fixture(params=DYNAMIC)
def engine(request):
    return Engine(request.param)


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_chunked_is_whole(engine, size):
    whole = engine.step(engine.request(), TOKENS)
    request = engine.request()
    parts = [engine.step(request, min(size, TOKENS - first)) for first in range(0, TOKENS, size)]
    close(torch.cat(parts), whole)


def test_warm_is_cold(engine):
    prompt = list(range(TOKENS))
    remembered = PrefixCache(engine.pool, PAGE, b"seed", engine.exact_pool)
    donor = engine.request()
    cold = engine.step(donor, TOKENS)
    remembered.insert(prompt, donor)
    donor.free()
    warm = engine.request()
    warm.adopt(remembered.acquire(prompt[:-1]))
    assert warm.length == 64, "four full pages are known"
    close(engine.step(warm, TOKENS - 64), cold[64:])


def test_a_fork_leaves_its_sibling_alone(engine):
    whole = engine.step(engine.request(), TOKENS)
    first = engine.request()
    engine.step(first, 40)
    second = first.fork()
    # The fork writes other tokens into the page that both were in.
    kept = engine.k
    engine.k = torch.randn_like(kept)
    engine.step(second, 20)
    engine.k = kept
    close(engine.step(first, TOKENS - 40), whole[40:])


def test_a_rejected_draft_leaves_no_trace(engine):
    whole = engine.step(engine.request(), TOKENS)
    request = engine.request()
    engine.step(request, 50)
    kept = engine.k
    engine.k = torch.randn_like(kept) * 9
    engine.step(request, 6)
    request.crop(50)
    engine.k = kept
    close(engine.step(request, TOKENS - 50), whole[50:])


def test_swapped_out_and_in_again(engine):
    whole = engine.step(engine.request(), TOKENS)
    request = engine.request()
    engine.step(request, 40)
    held = [page for page in request.exact_pages if page >= 0]
    host = engine.cache.swap_out(request.pages, held)
    for page in request.pages:
        engine.pool.release(page)
    other = engine.request()
    engine.step(other, 60)
    request.pages = [engine.pool.acquire() for _ in request.pages]
    engine.cache.swap_in(host, request.pages, held)
    close(engine.step(request, TOKENS - 40), whole[40:])


def test_saved_and_continued(engine, tmp_path):
    whole = engine.step(engine.request(), TOKENS)
    request = engine.request()
    engine.step(request, 40)
    engine.cache.save(tmp_path / "pages", note={"length": request.length})
    engine.cache, note = PagedKVCache.load(tmp_path / "pages", expected=engine.cache.layouts)
    assert note == {"length": 40}
    close(engine.step(request, TOKENS - 40), whole[40:])
