"""Stand-ins for what pages hold: what leaves them as they are, and what makes them dense."""

import pytest
import torch

from quantpage.integrations.hf_transformers.pages.lazy import LazyKV

pytestmark = pytest.mark.cpu

LIKE = torch.zeros(1, 2, 3, 4)
SAME = {
    "device": lambda x: x.to(LIKE.device),
    "dtype": lambda x: x.to(LIKE.dtype),
    "both": lambda x: x.to(device="cpu", dtype=torch.float32),
    "another": lambda x: x.to(LIKE),
    "type_as": lambda x: x.type_as(LIKE),
    "float": lambda x: x.float(),
}
OTHER = {
    "dtype": lambda x: x.to(torch.float16),
    "copy": lambda x: x.to(torch.float32, copy=True),
    "type_as": lambda x: x.type_as(LIKE.double()),
    "sum": lambda x: x + 1,
}
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


class Layer:
    """Pages that say when they are made dense."""

    index, length = 0, 3

    def __init__(self):
        self.why = None

    def serve_densely(self, why):
        self.why = why

    def dequantized(self, which):
        return torch.arange(24.0).reshape(1, 2, 3, 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convert", SAME.values(), ids=SAME)
def test_a_conversion_that_changes_nothing_leaves_pages_as_they_are(mode, convert):
    layer = Layer()
    with mode():
        made = LazyKV(layer, "key", LIKE, 3)
        assert convert(made) is made and layer.why is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convert", OTHER.values(), ids=OTHER)
def test_whatever_needs_numbers_gets_them_and_says_so(mode, convert):
    layer = Layer()
    with mode():
        found = convert(LazyKV(layer, "key", LIKE, 3))
        assert torch.equal(found, convert(layer.dequantized("key"))) and "its own code" in layer.why
