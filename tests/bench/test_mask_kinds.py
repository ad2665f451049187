"""What the mask bench divides by, and which masks share a compiled peer."""

import pytest
import torch

pytest.importorskip("triton")

from quantpage.bench.mask_flex import form_of
from quantpage.bench.mask_kinds import kinds, visible_pairs

TOKENS = 384


@pytest.mark.parametrize("name", kinds(TOKENS))
def test_visible_pairs_are_those_of_the_materialized_mask(name):
    mask = kinds(TOKENS)[name]
    seen = mask.materialize(torch.arange(TOKENS), TOKENS)
    assert visible_pairs(mask, TOKENS) == int(seen.sum())


def test_only_masks_that_hide_nothing_more_take_the_cheapest_forms():
    forms = {name: form_of(mask) for name, mask in kinds(TOKENS).items()}
    assert [name for name, form in forms.items() if form == "causal"] == ["causal"]
    assert [name for name, form in forms.items() if form == "full"] == ["full"]
    # A form says how many vectors its mask_mod reads: as many as the mask has, and causal or not.
    for name, mask in kinds(TOKENS).items():
        if name not in ("causal", "full"):
            kind = "causal" if mask.causal else "both"
            assert forms[name] == f"{kind}{mask.bounds.shape[2]}"
