"""What a cache holds: pages that no query will see are given back, and nothing else changes."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import quantpage
from quantpage.cache.saved import read_pages, write_pages
from quantpage.errors import CacheError, CorruptCache, OutOfPages
from quantpage.formats import FORMATS
from scripts.many_generations import rounds
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

PAGE = 16
WINDOWS = ["mistral_window", "gemma2_softcap_window", "gemma3_window"]
DYNAMIC = [name for name, each in FORMATS.items() if each.dynamic]


def held(cache):
    """By layer: pages and exact pages of the first row."""
    made = []
    for layer in cache.layers:
        row = cache.rows.tables[layer.reach][0]
        made.append(tuple(sum(p >= 0 for p in each) for each in (row.pages, row.exact_pages)))
    return made


@torch.inference_mode()
def logits(model, ids, cuts, cache=None):
    """Of every position, through the cache in the steps that end at ``cuts``."""
    made, start = [], 0
    for end in cuts:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        made.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(made, 1), cache


@pytest.mark.parametrize("kv_format", DYNAMIC)
@pytest.mark.parametrize("name", ["llama", *WINDOWS])
def test_the_cut_changes_nothing_and_few_pages_stay(name, kv_format):
    model, ids = tiny(name), tokens(2, 208)
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE):
        whole, cache = logits(model, ids, [208])
        long, _ = logits(model, ids, [86, 207, 208])
        short, other = logits(model, ids, [*range(9, 208, 9), 208])
    torch.testing.assert_close(long, whole, atol=1e-8, rtol=0)
    torch.testing.assert_close(short, whole, atol=1e-8, rtol=0)
    exact = FORMATS[kv_format].exact_pages is not None
    for each in (cache, other):
        each.flush()
        for layer, (pages, near) in zip(each.layers, held(each), strict=True):
            # A window of 24 and a page to roll back: tokens 169 .. 207.
            assert pages == (3 if layer.is_sliding else 13)
            assert near == ((2 if layer.is_sliding else 3) if exact else 0)


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
def test_a_window_beyond_the_prompt_equals_transformers_own(kv_format):
    model, ids = tiny("gemma3_window"), tokens(2, 300)
    wanted, _ = logits(model, ids, [250, 299, 300], DynamicCache(config=model.config))
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE):
        got, cache = logits(model, ids, [250, 299, 300])
    if kv_format == "none":
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)
    own = 0
    for layer in DynamicCache(config=model.config).layers:
        own += 2 * 2 * 32 * 8 * 2 * (min(300, 23) if layer.is_sliding else 300)
    assert cache.unquantized_bytes() == own


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_tokens_within_the_promise_can_be_forgotten(kv_format):
    model, ids = tiny("mistral_window"), tokens(1, 300)
    other = torch.cat([ids[:, :230], tokens(1, 40, seed=4)], 1)
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE):
        wanted, _ = logits(model, other, [270])
        for forget in (64, 60, 40):
            # A prompt with a draft at its end, of which only some tokens are accepted.
            _, cache = logits(model, ids[:, : 230 + forget], [230 + forget])
            cache.crop(-forget)
            got, _ = logits(model, other[:, 230:], [40], cache)
            torch.testing.assert_close(got, wanted[:, 230:], atol=1e-8, rtol=0)
        cache.flush()
        cache.crop(-PAGE)
        before = cache.get_seq_length(), held(cache)
        with pytest.raises(CacheError, match="crop: expected a length whose last pages are still"):
            cache.crop(-60)
        assert (cache.get_seq_length(), held(cache)) == before


@pytest.mark.parametrize("kv_format", ["none", "int4"])
def test_beams_and_a_padded_row_in_windows(kv_format):
    model, ids = tiny("gemma3_window"), tokens(1, 120)
    padded = torch.cat([torch.zeros(1, 37, dtype=torch.long), ids], 1)
    batch = torch.cat([padded, tokens(1, 157, seed=5)])
    mask = torch.ones_like(batch)
    mask[0, :37] = 0
    arguments = {"max_new_tokens": 40, "do_sample": False, "num_beams": 3}
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        both = model.generate(batch, attention_mask=mask, **arguments)
    assert both[0, 37:].tolist()[: alone.shape[1]] == alone[0].tolist()
    if kv_format == "none":
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert alone.tolist() == wanted.tolist()


def test_a_mask_that_shows_what_is_gone_is_refused():
    model, ids = tiny("mistral_window"), tokens(1, 200)
    with quantpage.attach(model, page_size=PAGE):
        _, cache = logits(model, ids, [200])
        for layer in model.model.layers:
            layer.self_attn.config.sliding_window = None
        model.config.sliding_window = None
        with pytest.raises(CacheError, match="layer 0: expected a mask that shows no token before"):
            logits(model, ids[:, :1], [1], cache)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mistral_window", "gemma3_window", "gpt_oss_sinks"])
def test_rows_of_a_batch_leave_their_windows_side_by_side(name, kv_format):
    model = tiny(name, torch.float32)
    ids = tokens(3, 90)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with quantpage.attach(model, kv_format, page_size=16):
        together = model.generate(ids, **options)
        alone = [model.generate(ids[row : row + 1], **options) for row in range(3)]
    assert together.shape == (3, 130)
    # A first token that differs by rounding makes the rest of a random model's text another one.
    assert torch.equal(together[:, 90], torch.cat(alone)[:, 90])


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma3_window"])
def test_a_known_maximum_is_allocated_once(name, kv_format):
    model, ids = tiny(name), tokens(2, 300)
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE, max_tokens=300):
        _, cache = logits(model, ids, [200])
        size = cache.rows.memory.size
        cache = logits(model, ids[:, 200:], range(1, 101), cache)[1]
        assert cache.rows.memory.size == size, "nothing grew"
        before = cache.get_seq_length(), held(cache)
        with pytest.raises(OutOfPages, match="max_tokens: expected at most 300 tokens a row"):
            logits(model, ids[:, :1], [1], cache)
        full = max(pages for pages, _ in size)
        assert full == 2 * -(-300 // PAGE) and before[1] == held(cache)
    with pytest.raises(
        ValueError, match="max_tokens: expected a whole number of at least 1, got 0"
    ):
        quantpage.attach(model, max_tokens=0)


def test_growth_is_modest_and_is_given_back():
    model, ids = tiny("llama"), tokens(1, 900)
    with quantpage.attach(model, kv_format="int8", page_size=PAGE):
        _, cache = logits(model, ids[:, :640], [640])
        assert cache.used_bytes() == cache.allocated_bytes()
        for end in range(641, 901, 20):
            _, cache = logits(model, ids[:, end - 1 : end + 19], [20], cache)
            cache.flush()
            assert cache.allocated_bytes() <= 1.04 * cache.used_bytes()
        assert cache.allocated_bytes() < cache.peak_bytes() < 1.5 * cache.allocated_bytes()
        full = cache.allocated_bytes()
        cache.crop(-600)
        assert cache.trim() == full - cache.allocated_bytes() > 0
        assert cache.used_bytes() == cache.allocated_bytes()
        got, _ = logits(model, ids[:, 300:320], [20], cache)
        wanted, _ = logits(model, ids[:, :320], [320])
    torch.testing.assert_close(got, wanted[:, 300:], atol=1e-8, rtol=0)


def test_shared_pages_count_once():
    model, ids = tiny("llama"), tokens(1, 64)
    with quantpage.attach(model, page_size=PAGE) as attached:
        _, cache = logits(model, ids, [64])
        cache.flush()
        once = cache.used_bytes()
        cache.batch_repeat_interleave(3)
        assert cache.used_bytes() == once == cache.allocated_bytes()
        assert cache.unquantized_bytes() == 3 * 64 * 3 * 2 * 2 * 16 * 8
        fork = cache.fork()
        assert (fork.used_bytes(), fork.allocated_bytes()) == (once, once)
        prompts = attached.prompts()
        prompts.learn(ids)
        known = prompts.new_cache(torch.cat([ids, ids], 1))
        other = prompts.new_cache(torch.cat([ids, ids], 1))
        assert known.used_bytes() == other.used_bytes() == known.allocated_bytes() == once


@pytest.mark.parametrize("kv_format", ["none", "int4"])
@pytest.mark.parametrize("name", ["gemma3_window", "mistral_window"])
def test_known_prompts_and_files_with_windows(name, kv_format, tmp_path):
    model, system = tiny(name), tokens(1, 160)
    ids = torch.cat([system, tokens(1, 30, seed=7)], 1)
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE) as attached:
        wanted, _ = logits(model, ids, [190])
        prompts = attached.prompts()
        assert prompts.learn(system) == (10 if name == "gemma3_window" else 3)
        for _ in range(2):
            cache = prompts.new_cache(ids)
            assert cache.get_seq_length() == 160
            assert [pages for pages, _ in held(cache)] == [
                2 if layer.is_sliding else 10 for layer in cache.layers
            ], "a hit takes the pages that a window of 24 sees"
            got, cache = logits(model, ids[:, 160:], [30], cache)
            torch.testing.assert_close(got, wanted[:, 160:], atol=1e-8, rtol=0)
        longer, _ = logits(model, ids[:, :1], [1], cache.fork())
        attached.save_cache(cache, tmp_path / "cache.pages")
        loaded = attached.load_cache(tmp_path / "cache.pages")
        assert held(loaded) == held(cache)
        assert loaded.allocated_bytes() == loaded.used_bytes() == cache.used_bytes()
        again, _ = logits(model, ids[:, :1], [1], loaded)
        assert torch.equal(again, longer)
        # Another prompt with the same beginning, shorter than what was learnt: its window is gone.
        assert prompts.new_cache(ids[:, :120]).get_seq_length() == 0


def test_many_short_generations_leave_nothing(request):
    model, ids = tiny("gemma3_window", torch.float32), tokens(2, 40)
    gc.collect()
    # What is there already is not looked at again in every turn.
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    with quantpage.attach(model, kv_format="int4", page_size=PAGE) as attached:
        prompts = attached.prompts(max_pages=8)
        before = None
        for turn in range(60):
            logits(model, ids, [40])
            cache = prompts.new_cache(tokens(1, 40, seed=turn))
            logits(model, tokens(1, 40, seed=turn), [40], cache)
            prompts.remember(tokens(1, 40, seed=turn), cache)
            del cache
            gc.collect()
            alive = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            if turn == 20:
                before = alive, prompts.new_cache(ids[:1]).allocated_bytes()
        assert (alive, prompts.new_cache(ids[:1]).allocated_bytes()) == before


@pytest.mark.parametrize("kv_format", ["none", "int4"])
def test_a_short_window_rolled_back_to_its_edge(kv_format):
    model, ids = tiny("mistral_window"), tokens(1, 120)
    model.config.sliding_window = 2
    with quantpage.attach(model, kv_format=kv_format, page_size=PAGE):
        wanted, _ = logits(model, ids, [120])
        for start in range(90, 97):
            _, cache = logits(model, ids, range(60, start + 1))
            cache.flush()
            cache.crop(-PAGE)
            got, _ = logits(model, ids[:, start - PAGE :], [1, 2, 40], cache)
            torch.testing.assert_close(got, wanted[:, start - PAGE : start + 24], atol=1e-8, rtol=0)


def test_pages_without_tables_are_no_cache(tmp_path):
    model, ids = tiny("llama"), tokens(1, 40)
    path = tmp_path / "pages"
    with quantpage.attach(model, page_size=PAGE) as attached:
        _, cache = logits(model, ids, [40])
        attached.save_cache(cache, path)
        saved = read_pages(path)
        note = {name: each for name, each in saved.note.items() if name != "tables"}
        write_pages(path, replace(saved, note=note))
        with pytest.raises(CorruptCache, match="expected the page tables of a cache"):
            attached.load_cache(path)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_generations_leave_nothing_behind(kv_format):
    """Sixty of them, through caches of every kind; scripts/many_generations.py does thousands."""
    # In the second round prompts are known, so that their steps are shorter than the first's.
    _, first, *later = rounds(tiny("mistral_window", torch.float32), kv_format, 4)
    assert later[0] == later[1]
    assert first.tensors == later[0].tensors and first.remembered > 0
