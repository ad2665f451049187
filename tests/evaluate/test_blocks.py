"""One layer changed: the same as the whole forward says, and what lies below is not computed."""

import pytest
import torch

from quantpage.evaluate.blocks import Unquantized
from quantpage.evaluate.caches import pages, unquantized
from quantpage.evaluate.score import Window, log_probabilities
from quantpage.formats.per_layer import LayerFormats
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

WINDOW = Window(tokens(1, 150, 3), 110)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_bias", "gemma3_window"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_layer_is_what_the_whole_forward_says(name, layer):
    model = tiny(name, torch.float32)
    exact = Unquantized.of(model, WINDOW)
    with torch.inference_mode(), unquantized(model) as new_cache:
        plain = log_probabilities(model, WINDOW, new_cache, WINDOW.scored)
    torch.testing.assert_close(exact.predictions, plain, atol=2e-5, rtol=1e-4)
    for line in (f"none,layers={layer}:int4", f"none,layers={layer}:k=int8,v=none"):
        attaching = pages(LayerFormats.parse(line), 16, "auto")
        found = exact.changed(model, layer, attaching)
        with torch.inference_mode(), attaching(model) as new_cache:
            wanted = log_probabilities(model, WINDOW, new_cache, WINDOW.scored)
        off = (wanted - plain).abs().mean()
        assert off > 1e-5
        # A key on the edge between two codes may fall on either side.
        assert (found - wanted).abs().mean() < off / 20
    again = Unquantized.of(model, WINDOW).predictions
    assert torch.equal(again, exact.predictions)


@pytest.mark.parametrize(("name", "counted"), [("llama", [1, 1, 2]), ("gemma3_window", [4, 4, 4])])
def test_what_lies_below_is_not_computed_again(name, counted):
    model = tiny(name, torch.float32)
    calls = [0, 0, 0]

    def count(index):
        def hook(module, given):
            calls[index] += 1

        return hook

    for index, block in enumerate(model.base_model.layers):
        block.mlp.register_forward_pre_hook(count(index))
    exact = Unquantized.of(model, WINDOW)
    exact.changed(model, 2, pages(LayerFormats.parse("none,layers=2:int8"), 16, None))
    assert calls == counted
    assert not any("forward" in vars(each) for each in model.base_model.layers)


def test_somebody_elses_forward_is_not_passed_over():
    model = tiny("llama", torch.float32)
    block = model.base_model.layers[0]
    block.forward = block.forward
    assert Unquantized.of(model, WINDOW).inputs == ()
