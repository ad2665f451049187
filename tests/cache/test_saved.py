"""Pages that leave and come back: bit for bit, or an error and nothing."""

import os
import random

import pytest
import torch

from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.errors import CorruptCache
from quantpage.formats import FORMATS, KeyMap

pytestmark = pytest.mark.cpu


def filled(name="int4", pages=5, exact_pages=3):
    """Two layers of different formats, every byte random."""
    cache = PagedKVCache(pages, exact_pages)
    for index, each in enumerate((name, "int8")):
        layout = CacheLayout(2, 32, FORMATS[each], 16)
        static = None
        if not layout.format.dynamic:
            static = tuple(
                tuple(
                    torch.rand(spec.granularity.scale_shape(2, 32)).to(spec.scale_dtype)
                    if wanted
                    else None
                    for wanted in (True, spec.zero_point)
                )
                for spec in (layout.format.key, layout.format.value)
            )
        cache.add_layer(index, layout, static)
    for plane in planes(cache):
        plane.copy_(torch.randint(0, 256, plane.shape, dtype=torch.uint8))
    return cache


def planes(cache, index=None):
    """Every tensor as bytes."""
    found = []
    for layer in cache.layouts if index is None else [index]:
        view = cache.layer(layer)
        for half in (view.key, view.value):
            found += [half.codes, half.scale, half.zero]
        found += [view.exact_key, view.exact_value]
    return [plane.view(torch.uint8) for plane in found if plane is not None]


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_saved_is_what_is_loaded(name, tmp_path):
    cache = filled(name)
    cache.save(tmp_path / "pages", note={"tokens": [1, 2, 3]})
    loaded, note = PagedKVCache.load(tmp_path / "pages", expected=cache.layouts)
    assert note == {"tokens": [1, 2, 3]}
    assert (loaded.pages, loaded.exact_pages, loaded.nbytes) == (5, 3, cache.nbytes)
    for mine, theirs in zip(planes(cache), planes(loaded), strict=True):
        assert torch.equal(mine, theirs)
    assert os.listdir(tmp_path) == ["pages"], "no temporary file stays"


def test_chosen_pages_are_numbered_in_their_order(tmp_path):
    cache = filled()
    cache.save(tmp_path / "pages", [4, 1], [2])
    loaded, _ = PagedKVCache.load(tmp_path / "pages")
    assert (loaded.pages, loaded.exact_pages) == (2, 1)
    assert torch.equal(loaded.layer(0).key.codes, cache.layer(0).key.codes[[4, 1]])
    assert torch.equal(
        loaded.layer(0).exact_key.view(torch.uint8), cache.layer(0).exact_key[[2]].view(torch.uint8)
    )


def test_every_altered_byte_is_found(tmp_path):
    path = tmp_path / "pages"
    filled(pages=2, exact_pages=1).save(path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    draw = random.Random(0)
    places = [*draw.sample(range(header), 100), *draw.sample(range(header, len(whole)), 40)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(CorruptCache):
            PagedKVCache.load(path)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 2000, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = tmp_path / "pages"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptCache, match="expected a whole safetensors file"):
        PagedKVCache.load(path)


def test_another_format_is_refused(tmp_path):
    filled("int8").save(tmp_path / "pages")
    wanted = {index: CacheLayout(2, 32, FORMATS["int8"], 16) for index in range(2)}
    wanted[1] = CacheLayout(2, 32, FORMATS["fp8"], 16)
    with pytest.raises(CorruptCache, match="layer 1, format: expected fp8, got int8"):
        PagedKVCache.load(tmp_path / "pages", expected=wanted)
    wanted[1] = CacheLayout(2, 32, FORMATS["int8"], 64)
    with pytest.raises(CorruptCache, match="layer 1, page_size: expected 64, got 16"):
        PagedKVCache.load(tmp_path / "pages", expected=wanted)
    with pytest.raises(CorruptCache, match=r"expected layers \[0\], got layers \[0, 1\]"):
        PagedKVCache.load(tmp_path / "pages", expected={0: wanted[0]})


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model")
    with pytest.raises(CorruptCache, match="expected a file of quantpage pages, got kind None"):
        PagedKVCache.load(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="expected a file of saved pages"):
        PagedKVCache.load(tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    cache, path = filled(), tmp_path / "pages"
    cache.save(path, note={"age": "old"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        cache.save(path, note={"age": object()})
    assert PagedKVCache.load(path)[1] == {"age": "old"}
    assert os.listdir(tmp_path) == ["pages"]


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "int4_static"])
def test_swapped_pages_come_back_elsewhere(name):
    cache = filled(name)
    before = [plane.clone() for plane in planes(cache)]
    host = cache.swap_out([3, 0], [1] if cache.layer(0).exact_key is not None else [])
    assert host.nbytes == cache.used_bytes(2, host.exact_pages)
    cache.swap_in(host, [2, 1], [0][: host.exact_pages])
    for old, new, exact in zip(before, planes(cache), is_exact(cache), strict=True):
        if exact:
            assert torch.equal(new[0], old[1]) and torch.equal(new[1:], old[1:])
        elif old.shape[0] == 5:
            assert torch.equal(new[[2, 1]], old[[3, 0]])
            assert torch.equal(new[[0, 3, 4]], old[[0, 3, 4]])
        else:
            assert torch.equal(new, old), "static scales do not move"
    with pytest.raises(ValueError, match="pages: expected 2, as were swapped out; got 1"):
        cache.swap_in(host, [1])


def is_exact(cache):
    """For each of ``planes``: whether its first dimension is exact pages."""
    return [
        each is view.exact_key or each is view.exact_value
        for view in map(cache.layer, cache.layouts)
        for each in (
            *(view.key.codes, view.key.scale, view.key.zero),
            *(view.value.codes, view.value.scale, view.value.zero),
            *(view.exact_key, view.exact_value),
        )
        if each is not None
    ]


@pytest.mark.parametrize("mean", [True, False])
def test_a_key_map_goes_with_its_pages(mean, tmp_path):
    cache = PagedKVCache(3, 3)
    mapped = KeyMap(torch.rand(2, 32) + 0.5, torch.randn(2, 32) if mean else None)
    cache.add_layer(0, CacheLayout(2, 32, FORMATS["int4"], 16), key_map=mapped)
    cache.grow(2)
    cache.save(tmp_path / "pages")
    loaded = PagedKVCache.load(tmp_path / "pages")[0].layer(0).key_map
    assert cache.layer(0).key_map == mapped and loaded.digest() == mapped.digest()
