"""Bytes of a layout, counted by hand."""

import pytest
import torch

from quantpage.cache import CacheLayout
from quantpage.formats import FORMATS

pytestmark = pytest.mark.pure


def test_exact_pages_are_four_a_request():
    """First, current, the one before it, and one more for a draft that is taken back."""
    layout = CacheLayout(2, 64, FORMATS["int4"], page_size=16, value_head_dim=32)
    page = 16 * 2 * (64 + 32) * 2
    assert layout.exact_bytes_per_page() == page
    assert layout.exact_bytes_per_request() == 4 * page


def test_formats_without_exact_pages_have_no_bytes_for_them():
    layout = CacheLayout(2, 64, FORMATS["int8"], page_size=16)
    assert layout.exact_bytes_per_page() == layout.exact_bytes_per_request() == 0


@pytest.mark.parametrize(
    "name,bits",
    [("none", 16 * 128), ("int8", 8 * 128 + 2 * 16), ("int4", 4 * 128 + 4 * 16)],
)
def test_tokens(name, bits):
    layout = CacheLayout(3, 64, FORMATS[name], page_size=16, dtype=torch.bfloat16)
    assert layout.bytes_per_token() == 3 * bits // 8
    assert layout.bytes_per_page() == 16 * layout.bytes_per_token()
