"""Layouts, views and the owner of the tensors."""

import pytest
import torch

from quantpage.cache import CacheLayout, LayerKV, PageCopy, PagedKVCache, QuantizedPages
from quantpage.errors import CacheError, FormatError
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec

pytestmark = pytest.mark.cpu


def layout(name="int8", **other):
    return CacheLayout(**{"kv_heads": 2, "head_dim": 64, "format": FORMATS[name], **other})


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.dynamic])
def test_what_is_planned_is_what_is_allocated(name):
    cache = PagedKVCache(7, 3)
    for index in range(2):
        cache.add_layer(index, layout(name, page_size=16))
    view, total = cache.layer(0), 0
    planes = [view.exact_key, view.exact_value]
    for half in (view.key, view.value):
        planes += [half.codes, half.scale, half.zero]
    total = sum(plane.nbytes for plane in planes if plane is not None)
    assert cache.nbytes == 2 * total
    assert (
        total
        == 7 * layout(name, page_size=16).bytes_per_page()
        + 3 * layout(name, page_size=16).exact_bytes_per_page()
    )


def test_bytes_of_a_known_layout():
    # 8 heads of 128 channels: 128 codes and one 16-bit scale, for K and for V.
    given = CacheLayout(8, 128, FORMATS["int8"], 64)
    assert given.bytes_per_token() == 8 * 2 * (128 + 2)
    assert given.unquantized_bytes_per_token() == 8 * 2 * 128 * 2
    # 64 bytes of nibbles, a scale and a zero.
    assert CacheLayout(8, 128, FORMATS["int4"], 64).bytes_per_token() == 8 * 2 * (64 + 4)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "none"])
def test_growing_keeps_the_contents(name):
    cache = PagedKVCache(2, 2)
    cache.add_layer(0, layout(name, dtype=torch.float32))
    cache.layer(0).key.codes.view(torch.uint8).fill_(7)
    cache.grow(3, 1)
    codes = cache.layer(0).key.codes.view(torch.uint8)
    assert codes.shape[0] == 5 and (codes[:2] == 7).all() and (codes[2:] == 0).all()


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_copies_move_codes_scales_and_exact_pages(name):
    cache = PagedKVCache(4, 4)
    cache.add_layer(0, layout(name))
    view = cache.layer(0)
    view.key.codes[1].view(torch.uint8).fill_(9)
    view.value.scale[1] = 2.5
    cache.copy_pages([PageCopy(1, 3)])
    assert (view.key.codes[3].view(torch.uint8) == 9).all() and (view.value.scale[3] == 2.5).all()
    if view.exact_key is not None:
        view.exact_key[2] = 1.5
        cache.copy_pages([PageCopy(2, 0, exact=True)])
        assert (view.exact_key[0] == 1.5).all() and (view.key.codes[0] == 0).all()


def test_static_formats_need_scales():
    cache = PagedKVCache(2)
    with pytest.raises(ValueError, match="static: expected scales for the static format fp8_stat"):
        cache.add_layer(0, layout("fp8_static"))
    scale = torch.ones(2, 1, dtype=torch.float16)
    cache.add_layer(0, layout("fp8_static"), ((scale, None), (scale, None)))
    assert cache.layer(0).key.scale is scale


def test_a_scale_of_the_wrong_shape_is_refused():
    codes = torch.zeros(3, 8, 16, 64, dtype=torch.int8)
    dynamic = QuantSpec(CODES["int8"])
    with pytest.raises(ValueError, match=r"scale: expected \(3, 8, 16, 1\) for dynamic int8"):
        QuantizedPages(dynamic, codes, torch.zeros(8))
    static = QuantSpec(CODES["int8"], dynamic=False)
    with pytest.raises(ValueError, match=r"scale: expected \(8, 1\) for static int8, got \(8,\)"):
        QuantizedPages(static, codes, torch.zeros(8))
    with pytest.raises(ValueError, match="scale: expected a tensor for code int8, got None"):
        QuantizedPages(dynamic, codes)
    with pytest.raises(ValueError, match="zero: expected None for code int8, got a tensor"):
        plane = torch.zeros(3, 8, 16, 1, dtype=torch.float16)
        QuantizedPages(dynamic, codes, plane, plane)


def test_halves_must_match():
    none = QuantSpec(CODES["none"])
    with pytest.raises(ValueError, match="value codes: expected pages, kv_heads, page_size"):
        LayerKV(
            QuantizedPages(none, torch.zeros(2, 2, 16, 64)),
            QuantizedPages(none, torch.zeros(2, 2, 32, 64)),
        )


@pytest.mark.parametrize("page_size", [0, 15, 48, 512])
def test_page_sizes(page_size):
    with pytest.raises(ValueError, match="page_size: expected one of"):
        layout(page_size=page_size)


def test_impossible_layouts():
    with pytest.raises(FormatError, match="group: expected a divisor of head_dim 80, got 64"):
        spec = QuantSpec(CODES["int8"], Granularity(group=64))
        spec.granularity.groups(80)
    cache = PagedKVCache(1)
    cache.add_layer(0, layout())
    with pytest.raises(CacheError, match="layer 0: expected a new index"):
        cache.add_layer(0, layout())
