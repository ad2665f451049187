"""Scales that are looked for: less loss than any law says, on keys that they have not seen."""

from dataclasses import replace

import pytest
import torch

from quantpage.formats.key_scales import search_scales
from quantpage.formats.key_statistics import choose_map
from tests.formats.key_cases import SPECS, lost, statistics

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", SPECS)
def test_other_keys_and_queries_lose_less(name):
    found, spec = statistics(1), SPECS[name]
    by_law, searched = (choose_map(found, spec, search=each) for each in (False, True))
    assert searched.loss < 0.9 * by_law.loss
    assert (searched.key_map.scale < 0).any() and (by_law.key_map.scale > 0).all()
    # Rounded with what was found, other tokens are asked.
    other = statistics(2)
    losses = [lost(other, spec, each.key_map, by=found) for each in (searched, by_law)]
    assert (losses[0] < 0.95 * losses[1]).all()


@pytest.mark.parametrize("head_dim", [32, 256])
def test_first_keys_are_heeded_where_they_are_not_exact(head_dim):
    """One key, the same in all texts and far from the mean of others, as models park attention."""
    found, spec = statistics(1, tokens=200, head_dim=head_dim), SPECS["int8"]
    found.first_keys = torch.full((3, 2, head_dim), 2.0)
    one = replace(found, keys=found.first_keys)
    laws, heeded, not_heeded = (
        choose_map(each, spec, search=searched).key_map
        for each, searched in ((found, False), (found, True), (found.far(), True))
    )
    of_first = [lost(one, spec, each, by=found) / 3 for each in (heeded, laws, not_heeded)]
    of_others = [lost(found, spec, each) / len(found.keys) for each in (heeded, laws)]
    assert (of_first[0] < 0.5 * of_first[1]).all() and (of_first[0] < 0.5 * of_first[2]).all()
    assert (of_first[0] + of_others[0] < 0.8 * (of_first[1] + of_others[1])).all()
    assert (of_others[1] < of_first[1]).all()


def test_the_same_numbers_make_the_same_scales():
    found = statistics(1)
    with torch.inference_mode():
        twice = [choose_map(found, SPECS["int4"], search=True).key_map.scale for _ in range(2)]
    assert torch.equal(*twice)


def test_channels_by_themselves_are_not_looked_for():
    found = statistics(1)
    maps = [choose_map(found, SPECS["int4"], feedback=False, search=each) for each in (True, False)]
    assert torch.equal(maps[0].key_map.scale, maps[1].key_map.scale)


def test_wide_heads_keep_what_the_laws_say():
    found = statistics(1, tokens=40, head_dim=256)
    maps = [choose_map(found, SPECS["int8"], search=each) for each in (True, False)]
    assert torch.equal(maps[0].key_map.scale, maps[1].key_map.scale)


@pytest.mark.parametrize("of", ["metric", "keys", "both"])
def test_heads_that_say_nothing_have_finite_scales(of):
    metric, keys = torch.eye(16).repeat(2, 1, 1), torch.randn(40, 2, 16)
    if of != "keys":
        metric[0] = 0.0
    if of != "metric":
        keys[:, 0] = 0.0
    scale = search_scales(metric, keys, torch.ones(2, 16), SPECS["int4"])
    assert torch.isfinite(scale).all() and (scale != 0).all()
