"""What lies on the host says so: a caller may have named another default device."""

import ast
from pathlib import Path

import pytest
import torch

import quantpage
from quantpage import masks
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

SOURCES = Path(quantpage.__file__).parent
MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"}
MAKERS |= {"randn", "randperm", "tensor", "zeros"}


@pytest.fixture
def elsewhere():
    """A default device on which nothing can be read, as a GPU's memory cannot by the host."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def nameless(path):
    """Lines that make a tensor on whatever device is the default."""
    for each in ast.walk(ast.parse(path.read_text())):
        match each:
            case ast.Call(func=ast.Attribute(ast.Name("torch"), made), keywords=told):
                if made in MAKERS and not {"device", None} & {word.arg for word in told}:
                    yield f"{path.relative_to(SOURCES)}:{each.lineno}"


@pytest.mark.pure
def test_every_tensor_that_is_made_names_its_device():
    # Benches are programs of their own, and vLLM's plugin runs under the device that vLLM names.
    left = {"bench", "vllm_plugin"}
    paths = [each for each in SOURCES.rglob("*.py") if left.isdisjoint(each.parts)]
    assert [line for path in paths for line in nameless(path)] == []


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_a_model_answers_under_any_default_device(implementation, request):
    # Two that are alike, as what is measured of one is kept.
    before, under = tiny("qwen2_bias", torch.float32), tiny("qwen2_bias", torch.float32)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :9] = 0
    other = torch.tensor([1, 0])
    shown = masks.prefix_lm(60, 8)

    def answer(model, kv_format, **options):
        by = {"page_size": 16, "implementation": implementation, **options}
        with quantpage.attach(model, kv_format, **by) as attached, torch.inference_mode():
            cache = attached.new_cache()
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.reorder_cache(other)
            cache.crop(-3)
            return model(ids[:, :5], past_key_values=cache.fork()).logits

    asked = [("int8", {}), ("int4", {}), ("none", {"backend": "flash_mask", "mask": shown})]
    wanted = [answer(before, name, **options) for name, options in asked]
    request.getfixturevalue("elsewhere")
    for (name, options), want in zip(asked, wanted, strict=True):
        assert torch.equal(answer(under, name, **options), want)
