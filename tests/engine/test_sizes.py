"""What an engine lays out is what was counted before its model ran, to the byte."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

import quantpage
from quantpage.engine import Limits
from quantpage.engine.sizes import fit_pages, pool_bytes, unquantized_pool_bytes
from quantpage.engine.step import StepRunner
from quantpage.integrations.hf_transformers.sizes import cache_shape
from tests.integrations.architectures import FOUR, LATENT
from tests.integrations.tiny_models import tiny

pytestmark = pytest.mark.cpu

PAGE = 16
LIMITS = Limits(pages=90, max_running=3, step_tokens=20)


def latent():
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.DeepseekV2Config(**{**FOUR, **LATENT})).eval()


MODELS = {
    "llama": lambda: tiny("llama", torch.float32),
    "windows in all layers": lambda: tiny("mistral_window", torch.float32),
    "windows in some": lambda: tiny("gemma3_window", torch.float32),
    "latents": latent,
}


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@pytest.mark.parametrize("kv_format", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_holds_what_was_counted(name, kv_format):
    model = MODELS[name]()
    with quantpage.attach(model, kv_format, page_size=PAGE) as attached:
        shape = replace(cache_shape(model.config), dtype=model.dtype)
        layers = shape.layers(attached.formats, PAGE)
        runner = StepRunner(attached, LIMITS)
        assert runner.memory.allocated_bytes() == pool_bytes(layers, LIMITS)
    if name == "latents":
        # One latent for all heads, the rotary part beside it: not heads times head_dim.
        assert {(each.layout.kv_heads, each.layout.head_dim) for each in layers} == {(1, 32)}
    whole = sum(each.layout.unquantized_bytes_per_token() for each in layers) * PAGE * LIMITS.pages
    plain = unquantized_pool_bytes(layers, LIMITS)
    assert plain < whole if name.startswith("windows") else plain == whole


@pytest.mark.parametrize("name", ["llama", "windows in some", "windows in all layers"])
def test_memory_is_filled_and_not_more(name):
    shape = cache_shape(MODELS[name]().config)
    layers = shape.layers(quantpage.LayerFormats.of("int8"), PAGE)
    most = pool_bytes(layers, LIMITS)
    for memory in (most // 3, most // 2, most, 2 * most):
        found = fit_pages(layers, LIMITS, memory)
        assert pool_bytes(layers, found) <= memory
        if found.pages < LIMITS.pages:
            assert pool_bytes(layers, replace(found, pages=found.pages + 1)) > memory
    two = pool_bytes(layers, replace(LIMITS, pages=2))
    assert fit_pages(layers, LIMITS, two).pages >= 2
    with pytest.raises(
        ValueError, match=f"at least {two:,} bytes, two pages of every layer; got 5"
    ):
        fit_pages(layers, LIMITS, 5)


def test_memory_that_exact_pages_fill_names_the_number_of_requests():
    layers = cache_shape(MODELS["llama"]().config).layers(quantpage.LayerFormats.of("int4"), PAGE)
    one = pool_bytes(layers, replace(LIMITS, pages=2, max_running=1))
    with pytest.raises(ValueError, match=f"max_requests=3 .max_requests=1: {one:,}") as raised:
        fit_pages(layers, LIMITS, one)
    assert "beside the exact pages" in str(raised.value)
    assert fit_pages(layers, replace(LIMITS, max_running=1), one).pages == 2
