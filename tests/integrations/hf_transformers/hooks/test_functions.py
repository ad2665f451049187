"""A model that copies or slices the mask it was given loses what was attached to it, no window."""

import pytest
import torch

from quantpage.integrations.hf_transformers.hooks.functions import _facts, facts_of

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("window", [None, 1, 7])
def test_a_rebuilt_mask_keeps_the_layers_window(window):
    rebuilt = torch.ones(2, 9, dtype=torch.bool)[:, :8].clone()
    assert facts_of(rebuilt, window).window == window
    assert facts_of(None, window).window == window
    found = _facts(torch.nn.Linear(1, 1), rebuilt, {"sliding_window": window})
    assert found is not None and found.window == window
