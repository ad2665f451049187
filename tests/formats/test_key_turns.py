"""Matrices that are looked for: less loss than scales, on keys that they have not seen."""

from dataclasses import replace

import pytest
import torch

from quantpage.formats import CODES, KeyMap, QuantSpec
from quantpage.formats.key_statistics import choose_map
from quantpage.formats.key_turns import search_turn
from tests.formats.key_cases import SPECS, lost, statistics

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", SPECS)
def test_other_keys_and_queries_lose_less(name):
    found, spec = statistics(1), SPECS[name]
    turned = choose_map(found, spec, search=True).key_map
    scaled = replace(turned, turn=None)
    other = statistics(2)
    losses = [lost(other, spec, each, by=found) for each in (turned, scaled)]
    assert (losses[0] < 0.85 * losses[1]).all()


def test_the_same_numbers_make_the_same_matrix():
    found = statistics(1)
    with torch.inference_mode():
        twice = [choose_map(found, SPECS["int4"], search=True).key_map.turn for _ in range(2)]
    assert torch.equal(*twice)


def test_every_key_counts():
    """Steps look at some of them each."""
    noise = torch.Generator().manual_seed(0)
    keys = torch.randn(1100, 1, 16, generator=noise)
    spec, scales = QuantSpec(CODES["int4"]), KeyMap(torch.ones(1, 16))
    found = search_turn(torch.eye(16)[None], keys, scales, spec)
    for each in range(0, 1100, 157):
        # As long as it was: a longer one would change the size that all are measured by.
        other = keys.clone()
        other[each, :, ::2] *= -1.0
        assert not torch.equal(search_turn(torch.eye(16)[None], other, scales, spec), found)


@pytest.mark.parametrize("of", ["metric", "keys", "both"])
def test_heads_that_say_nothing_keep_an_inverse(of):
    metric, keys = torch.eye(16).repeat(2, 1, 1), torch.randn(40, 2, 16)
    if of != "keys":
        metric[0] = 0.0
    if of != "metric":
        keys[:, 0] = 0.0
    turn = search_turn(metric, keys, KeyMap(torch.ones(2, 16)), SPECS["int4"])
    assert torch.isfinite(KeyMap(torch.ones(2, 16), turn=turn).unturn).all()


def test_heads_that_gain_nothing_keep_their_keys_as_they_are(monkeypatch):
    """A matrix that is good for one head and bad for the other."""
    found, spec = statistics(1), SPECS["int4"]

    def spoiled(*given):
        turn = search_turn(*given)
        turn[1] = torch.diag(torch.linspace(0.01, 9.0, 32))
        return turn

    whole = choose_map(found, spec, search=True).key_map.turn
    monkeypatch.setattr("quantpage.formats.key_statistics.search_turn", spoiled)
    made = choose_map(found, spec, search=True).key_map.turn
    assert torch.equal(made[1], torch.eye(32))
    assert torch.equal(made[0], whole[0]) and not torch.equal(whole[0], torch.eye(32))
