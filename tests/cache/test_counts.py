"""Numbers and pages that an owner is told of: whole ones that are there, or an error that names
them and leaves everything as it was."""

import pytest
import torch

from quantpage.cache import CacheLayout, HostPages, PageCopy, PagedKVCache, PagePool, Sequence
from quantpage.cache.prefix import PrefixCache
from quantpage.errors import CacheError, CorruptCache
from quantpage.formats import FORMATS

pytestmark = pytest.mark.pure
NO_COUNTS = (-1, 1.5, "3", None)


def filled(name="int8", pages=4, exact_pages=0, **layout):
    cache = PagedKVCache(pages, exact_pages)
    layout = {"kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.float32, **layout}
    cache.add_layer(0, CacheLayout(format=FORMATS[name], **layout))
    for plane in whole(cache).values():
        plane.view(torch.uint8).random_(0, 100)
    return cache


def whole(cache):
    view = cache.layer(0)
    return {
        "key.codes": view.key.codes,
        "value.codes": view.value.codes,
        **({} if view.key.scale is None else {"key.scale": view.key.scale}),
        **({} if view.exact_key is None else {"exact_key": view.exact_key}),
    }


@pytest.mark.parametrize("wrong", NO_COUNTS)
def test_what_counts_is_a_whole_number(wrong):
    pool = PagePool(5)
    request = Sequence(pool, 16)
    request.reserve(20)
    acts = {
        "capacity": lambda: PagePool(wrong),
        "pages": lambda: pool.acquire_all(wrong),
        "page_size": lambda: Sequence(pool, wrong),
        "length": lambda: Sequence(pool, 16).crop(wrong),
        "tokens": lambda: Sequence(pool, 16).reserve(wrong),
        "exact_pages": lambda: PagedKVCache(3, wrong),
        "index": lambda: PagedKVCache(3).add_layer(wrong, CacheLayout(2, 32, FORMATS["int8"])),
        "head_dim": lambda: CacheLayout(2, wrong, FORMATS["int8"]),
    }
    for name, act in acts.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected a whole number of at least"):
            act()
    with pytest.raises(ValueError, match=r"^page_size: expected a whole number of at least 1"):
        PrefixCache(pool, wrong, b"")
    if wrong is not None:
        with pytest.raises(ValueError, match=r"^tokens: expected a whole number"):
            request.commit(wrong)
        with pytest.raises(ValueError, match=r"^value_head_dim: expected a whole number"):
            CacheLayout(2, 32, FORMATS["int8"], value_head_dim=wrong)
    if wrong != -1:
        cache = filled()
        with pytest.raises(ValueError, match=r"^pages: expected a whole number"):
            cache.grow(wrong)
        assert cache.pages == 4
    assert (pool.free, request.length, request.reserved) == (3, 0, 20)
    request.commit(17)
    assert request.length == 17


def test_a_layout_is_of_a_format_and_a_dtype_of_models():
    with pytest.raises(ValueError, match=r"format: expected a KVFormat .* got 'int8'"):
        CacheLayout(2, 32, "int8")
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool):
        with pytest.raises(ValueError, match=r"dtype: expected that of a model, .* got torch"):
            CacheLayout(2, 32, FORMATS["none"], dtype=dtype)


def test_more_pages_than_there_are_cannot_be_taken_away():
    cache = filled()
    with pytest.raises(ValueError, match="pages: expected a whole number of at least -4, got -5"):
        cache.grow(-5)
    cache.grow(-4)
    assert cache.layer(0).key.pages == 0


def test_a_layer_that_is_not_there():
    with pytest.raises(CacheError, match=r"index: expected a layer of \[0\], got 7"):
        filled().layer(7)


@pytest.mark.parametrize("wrong", [-1, 4, 1.0])
def test_pages_that_are_not_there(wrong, tmp_path):
    cache = filled()
    before = {name: plane.clone() for name, plane in whole(cache).items()}
    taken = cache.swap_out([0, 1])
    said = r"expected (page ids below 4|a whole number of at least 0), got"
    for name, act in {
        "pages": lambda: cache.swap_out([0, wrong]),
        "pages ": lambda: cache.swap_in(taken, [2, wrong]),
        "pages  ": lambda: cache.save(tmp_path / "pages", [0, wrong]),
        "copies": lambda: cache.copy_pages([PageCopy(0, 1), PageCopy(2, wrong)]),
        "copies ": lambda: cache.copy_pages([PageCopy(0, 1), PageCopy(wrong, 2)]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: {said} {wrong}"):
            act()
    assert all(torch.equal(plane, before[name]) for name, plane in whole(cache).items())
    assert not list(tmp_path.iterdir())


def test_exact_pages_of_a_format_without():
    cache = filled()
    with pytest.raises(ValueError, match="exact_pages: expected page ids below 0, got 1"):
        cache.swap_out([0], [1])
    with pytest.raises(ValueError, match="copies: expected page ids below 0, got 1"):
        cache.copy_pages([PageCopy(1, 2, exact=True)])


def test_pages_of_another_cache_are_not_swapped_in():
    cache = filled(exact_pages=2)
    before = {name: plane.clone() for name, plane in whole(cache).items()}
    more = filled(exact_pages=2)
    more.add_layer(1, more.layouts[0])
    strangers = {
        "one head": filled(kv_heads=1),
        "wider": filled(head_dim=64),
        "other codes": filled("fp8"),
        "unquantized": filled("none"),
        "a layer more": more,
    }
    for name, other in strangers.items():
        taken = other.swap_out([0, 1])
        with pytest.raises(ValueError, match="host: expected"):
            cache.swap_in(taken, [2, 3])
        assert all(torch.equal(x, before[key]) for key, x in whole(cache).items()), name
    with pytest.raises(ValueError, match=r"host: expected 1\.key\.codes as .* got none"):
        more.swap_in(cache.swap_out([0]), [1])
    with pytest.raises(ValueError, match=r"pages: expected each page once, got \[3, 3\]"):
        cache.swap_in(cache.swap_out([0, 1]), [3, 3])
    assert isinstance(cache.swap_out([0]), HostPages)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_given_scales_are_positive_numbers(wrong, half, tmp_path):
    layout = CacheLayout(2, 32, FORMATS["int8_static"], 16)
    pairs = [(torch.ones(2, 32), None), (torch.ones(2, 32), None)]
    cache = PagedKVCache(2)
    pairs[half][0][1, 5] = wrong
    with pytest.raises(ValueError, match="static: expected finite numbers above 0 as scale, got"):
        cache.add_layer(0, layout, tuple(pairs))
    assert cache.layouts == {}
    pairs[half][0][1, 5] = 1.0
    cache.add_layer(0, layout, tuple(pairs))
    # A file whose checksum is right may have been made on purpose.
    (cache.layer(0).key, cache.layer(0).value)[half].scale[1, 5] = wrong
    cache.save(tmp_path / "pages")
    with pytest.raises(CorruptCache, match="layer 0: static: expected finite numbers above 0"):
        PagedKVCache.load(tmp_path / "pages")


def test_given_scales_belong_to_static_formats_and_are_tensors():
    ones = (torch.ones(2, 32), None)
    layout = CacheLayout(2, 32, FORMATS["int8"], 16)
    with pytest.raises(ValueError, match="static: expected None where int8 computes its scales"):
        PagedKVCache(2).add_layer(0, layout, (ones, ones))
    layout = CacheLayout(2, 32, FORMATS["int8_static"], 16)
    with pytest.raises(ValueError, match="static: expected a tensor as scale, got list"):
        PagedKVCache(2).add_layer(0, layout, (([1.0], None), ([1.0], None)))
    zeros = (torch.full((2, 1), 0.5), torch.full((2, 1), float("nan")))
    layout = CacheLayout(2, 32, FORMATS["int4_static"], 16)
    shape = layout.format.key.granularity.scale_shape(2, 32)
    zeros = tuple(each[:, :1].expand(shape).contiguous() for each in zeros)
    with pytest.raises(ValueError, match="static: expected finite numbers as zero, got nan"):
        PagedKVCache(2).add_layer(0, layout, (zeros, zeros))
