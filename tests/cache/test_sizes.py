"""Bytes are counted without listing pages: the same as listing them, and at any length."""

from itertools import product

import pytest
import torch

from quantpage.cache import CacheLayout
from quantpage.cache.reach import (
    EVERYTHING,
    Reach,
    exact_seen,
    kept_from,
    kept_from_within,
    pages_seen,
)
from quantpage.cache.sizes import LayerPlan, held_bytes, prompt_bytes
from quantpage.formats import FORMATS

pytestmark = pytest.mark.pure

PAGE = 16
REACHES = (EVERYTHING, Reach(window=1), Reach(window=40), Reach(chunk=48), Reach(window=500))


def plan(name, reach):
    return LayerPlan(CacheLayout(2, 16, FORMATS[name], PAGE, torch.bfloat16), reach)


def listed(each, start, tokens):
    """The last step of a prompt, page by page."""
    layout, total = each.layout, 0
    before, after = kept_from(start, PAGE), kept_from_within(start, tokens, PAGE)
    for seen, size in (
        (pages_seen, layout.bytes_per_page()),
        (exact_seen, layout.exact_bytes_per_page()),
    ):
        held = {*seen(each.reach, before, start, PAGE), *seen(each.reach, after, tokens, PAGE)}
        read, kept = seen(each.reach, start, tokens, PAGE), seen(each.reach, after, tokens, PAGE)
        works = any(page * PAGE >= start and page not in kept for page in read)
        total += (len(held) + works * len(read)) * size
    return total


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("reach", REACHES)
def test_counting_is_listing(name, reach):
    each = plan(name, reach)
    for tokens, chunk in product((1, 15, 16, 17, 47, 48, 49, 200, 513), (None, 1, 16, 30, 100)):
        start = 0 if chunk is None else (tokens - 1) // chunk * chunk
        assert prompt_bytes([each], tokens, chunk=chunk) == listed(each, start, tokens)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_request_of_any_length_is_counted(name):
    each, tokens = plan(name, EVERYTHING), 1 << 40
    pages = tokens // PAGE
    exact = 0 if name == "int8" else pages
    layout = each.layout
    held = pages * layout.bytes_per_page()
    assert held_bytes([each], tokens) == held + (3 if exact else 0) * layout.exact_bytes_per_page()
    working = exact * layout.exact_bytes_per_page()
    assert prompt_bytes([each], tokens) == pytest.approx(held + working, rel=1e-6)
