"""attach takes formats of one's own, keys and values apart, and any layers."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

from quantpage import attach
from quantpage.cache import CacheLayout
from quantpage.errors import FormatError
from quantpage.formats import CODES, FORMATS, ExactPages, Granularity, KVFormat, QuantSpec
from quantpage.formats.per_layer import LayerFormats
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu

OWN = KVFormat(
    "mine",
    QuantSpec(CODES["int8"], Granularity(16), zero_point=True),
    QuantSpec(CODES["int4"], rotation="hadamard"),
    ExactPages(),
)


GROUPED = KVFormat("groups of 32", *2 * (QuantSpec(CODES["int8"], Granularity(32)),))


def layouts_of(model, kv_format):
    with attach(model, kv_format) as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(tokens(1, 70), past_key_values=cache)
        return [cache.rows.memory.layouts[layer].format for layer in range(3)]


@pytest.mark.parametrize(
    "kv_format",
    [
        "k=int8,v=fp8",
        "k=none,v=int4",
        "k=int4,v=none,first1=int8",
        "int4,layers=1:k=fp8,v=int8",
        OWN,
    ],
    ids=str,
)
def test_layers_get_what_was_asked_and_answers_are_near(kv_format):
    model, ids = tiny("llama", torch.float32), tokens(1, 200)
    wanted = LayerFormats.of(kv_format).of_layers(3)
    assert tuple(layouts_of(model, kv_format)) == wanted
    with torch.inference_mode():
        exact = model(ids).logits.double().log_softmax(-1)
        with attach(model, kv_format):
            near = model(ids).logits.double().log_softmax(-1)
        with attach(model, replace(FORMATS["none"])):
            none = model(ids).logits.double().log_softmax(-1)

    def divergence(other):
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    assert abs(divergence(none)) < 1e-6 < divergence(near) < 0.2


def test_a_choice_that_does_not_fit_changes_nothing():
    model = tiny("llama", torch.float32)
    before = model.config._attn_implementation
    for kv_format, words in (
        ("int8,layers=3:int4", "expected layers of 0 to 2"),
        (replace(FORMATS["int8_static"], name="given"), "static scales for given"),
        (GROUPED, "kv_format: layer 0, group: expected a divisor of head_dim 16, got 32"),
        ("int8,layers=1:int3", None),
    ):
        if words is None:
            attach(model, kv_format).detach()
            continue
        with pytest.raises(FormatError, match=words):
            attach(model, kv_format)
    with pytest.raises(ValueError, match="kv_format: expected a name, a KVFormat"):
        attach(model, 8)
    assert model.config._attn_implementation == before and not model._forward_pre_hooks
    assert CacheLayout(2, 16, OWN).bytes_per_token() == 2 * (16 + 4 + 8 + 2)


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
def test_a_group_fits_the_latent_and_the_rotary_part_or_is_refused():
    latent = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
    config = tf.DeepseekV2Config(
        **COMMON, **latent, **experts, qk_nope_head_dim=16, v_head_dim=16, moe_intermediate_size=32
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(FormatError, match="layer 0, group: expected a divisor of head_dim 16, got"):
        attach(model, GROUPED)
    attach(model, KVFormat("keys alone", GROUPED.key, FORMATS["int8"].value)).detach()
