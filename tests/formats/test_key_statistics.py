"""Scales of keys by what their rounding costs: chosen on keys, in the metric of queries."""

from dataclasses import replace

import pytest
import torch

from quantpage.formats import FORMATS, dequantize, rotate
from quantpage.formats.feedback import quantize_with_feedback, with_feedback
from quantpage.formats.key_statistics import EXPONENTS, KeyStatistics, choose_map
from tests.formats.key_cases import lost

pytestmark = pytest.mark.cpu


def statistics(sizes, tokens=600):
    """Keys about a mean, and queries with the same unlike channels."""
    noise = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, 4, 64, generator=noise) * sizes
    k = torch.randn(tokens, 2, 64, generator=noise) * sizes + 5.0
    found = KeyStatistics.of(q, k)
    # As few as laws are tried on.
    return replace(found, keys=found.keys[::3])


def test_keys_are_kept_as_they_come():
    """Up to a thousand of a text, every second one of a longer, in as few bits as they have."""
    noise = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2048, 1, 16, generator=noise).bfloat16() for _ in range(2))
    found = KeyStatistics.of(q, k)
    assert torch.equal(found.keys, k[::2]) and found.keys.dtype == torch.bfloat16
    assert KeyStatistics.of(q, k.double()).keys.dtype == torch.float32
    assert len(KeyStatistics.of(q, k[:600]).keys) == 600
    twice = found + found + found + found
    assert len(twice.keys) == 4096 and len((twice + found).keys) == 2560
    spec = FORMATS["int4"].key
    wide = replace(found, keys=found.keys.float())
    maps = [choose_map(each, spec, search=True).key_map for each in (found, wide)]
    assert maps[0].digest() == maps[1].digest()


@pytest.mark.parametrize("name", ["int6", "int4", "int3"])
def test_keys_rounded_in_turn_are_made_even_whatever_the_queries(name):
    spec = FORMATS[name].key
    found = statistics(4.0 ** torch.linspace(-0.6, 0.6, 64))
    chosen = choose_map(found, spec)
    assert all(b > a for a, b in chosen.exponents)
    ours = lost(found, spec, chosen.key_map)
    # What is least where channels are rounded by themselves, in part and whole.
    others = [lost(found, spec, found.key_map(a=each, b=each)) for each in (0.0, 1 / 8, 1 / 4)]
    assert (ours < 0.95 * torch.stack(others).amin(0)).all()


def test_the_choice_loses_least_of_all_that_are_tried():
    spec = FORMATS["int4"].key
    found = statistics(torch.ones(64))
    chosen = choose_map(found, spec)
    every = torch.stack([lost(found, spec, found.key_map(a=a, b=b)) for a, b in EXPONENTS])
    torch.testing.assert_close(lost(found, spec, chosen.key_map), every.amin(0))
    assert chosen.loss < chosen.plain_loss


def test_channels_that_are_rounded_by_themselves_have_scales_of_their_own():
    spec = FORMATS["int4"].key
    found = statistics(4.0 ** torch.linspace(-0.6, 0.6, 64))
    chosen = choose_map(found, spec, feedback=False)
    every = [lost(found, spec, found.key_map(a=a, b=b), False) for a, b in EXPONENTS]
    torch.testing.assert_close(lost(found, spec, chosen.key_map, False), torch.stack(every).amin(0))
    assert not torch.equal(chosen.key_map.scale, choose_map(found, spec).key_map.scale)


def test_queries_count_by_what_they_see_beyond_exact_pages():
    noise = torch.Generator().manual_seed(0)
    tokens, sizes = 4000, 4.0 ** torch.linspace(-0.6, 0.6, 64)
    q, k = (torch.randn(tokens, 4, 64, generator=noise) for _ in range(2))
    # Half of the queries look at their neighbours, with the channels that the others leave out.
    q[::2] *= sizes
    q[1::2] *= sizes.flip(0) * 3
    far = torch.full((tokens, 4), 0.25)
    far[1::2] = 0.0
    # The queries of the last kv_head see nothing there.
    far[:, 3] = 0.0
    found = KeyStatistics.of(q, k, far)
    seen = found.far().metric
    ratio = seen[:3] / KeyStatistics.of(q[::2], k[::2]).metric[:3]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.125))
    assert torch.equal(seen[3], found.metric[3])
    other = found + KeyStatistics.of(q, k)
    torch.testing.assert_close(other.far_products, found.far_products + found.query_products)

    spec = FORMATS["int4"].key
    rotated = rotate(found.keys)

    def cost(metric):
        by = with_feedback(found.key_map(a=0.0, b=0.0, mean=False), metric, True).feedback
        error = rotate(dequantize(*quantize_with_feedback(rotated, spec, by), spec)) - found.keys
        return torch.einsum("thi,hij,thj->h", error.double(), seen, error.double())[:3]

    assert (cost(seen) < 0.9 * cost(found.metric)).all()
