"""Models whose pages hold latent rows (MLA), against their own dense attention."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import quantpage
from quantpage.cache.sizes import held_bytes
from quantpage.errors import FormatError, PartlyPaged
from quantpage.formats import FORMATS, dequantize, quantize, rotate
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.keys import key_maps
from quantpage.integrations.hf_transformers.modules.arguments import cache_as
from quantpage.integrations.hf_transformers.sizes import cache_shape
from quantpage.integrations.int8_weights import Int8Linear
from quantpage.masks import CausalMask
from tests.integrations.tiny_models import COMMON, tokens

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not hasattr(DeepseekV3Attention, "expand_kv"),
        reason="this Transformers caches keys and values of every head",
    ),
]

SIZES = {
    **COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    # Routers choose by near ties.
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
BUILDERS = {
    "v2": lambda: tf.DeepseekV2Config(**SIZES, q_lora_rank=32),
    "v2_lite": lambda: tf.DeepseekV2Config(**SIZES, q_lora_rank=None),
    "v3": lambda: tf.DeepseekV3Config(**SIZES, q_lora_rank=32, n_group=1, topk_group=1),
    "v3_yarn": lambda: tf.DeepseekV3Config(
        **SIZES, q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=YARN
    ),
    "v3_not_interleaved": lambda: tf.DeepseekV3Config(
        **SIZES, q_lora_rank=32, n_group=1, topk_group=1, rope_interleave=False
    ),
}
PAGE = 16


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(
        BUILDERS[name](), dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def v3():
    return build("v3")


def attach(model, kv_format="none", **options):
    with warnings.catch_warnings():
        # Nothing is dense, and nobody says so.
        warnings.simplefilter("error", PartlyPaged)
        return quantpage.attach(model, kv_format, page_size=PAGE, **options)


def close(got, want):
    """An order of sums is all that differs, and norms and rotations that are float32's."""
    allowed = 1e-4 if want.dtype == torch.float32 else 1e-5
    assert (got - want).abs().max() < allowed * want.abs().max()


@torch.no_grad()
def stepwise(model, cache, ids, ends):
    found, start = [], 0
    for end in ends:
        found.append(model(ids[:, start:end], use_cache=True, **cache_as(model, cache)).logits)
        start = end
    return torch.cat(found, 1)


@torch.no_grad()
def test_prompts_chunks_and_single_tokens_are_the_models_own(model):
    ids, ends = tokens(2, 90), [40, 70, 71, 72, 88, 90]
    own = stepwise(model, DynamicCache(config=model.config), ids, ends)
    close(own, model(ids).logits)
    with attach(model) as attached:
        cache = attached.new_cache()
        close(stepwise(model, cache, ids, ends), own)
        assert str(attached.coverage) == (
            "3 of 3 layers read pages; 3 of them latent rows, one a token for all heads (MLA)"
        )
        assert attached.coverage.whole and attached.coverage.latent == 3
    close(model(ids).logits, own)


def generated(model, ids, mask, **more):
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("way", ["padded", "beams", "lookup"])
@torch.no_grad()
def test_padding_beams_and_drafts_are_the_models_own(v3, way):
    ids, more = tokens(2, 37), {}
    mask = torch.ones_like(ids)
    if way == "padded":
        # Eager attention makes NaN of padding in float64, whose lowest number is no float32.
        v3 = copy.deepcopy(v3).float()
        mask[0, :9] = 0
        ids = ids.masked_fill(mask == 0, 0)
    elif way == "beams":
        more = {"num_beams": 3}
    else:
        ids = tokens(1, 12).repeat(1, 3)
        mask, more = torch.ones_like(ids), {"prompt_lookup_num_tokens": 4}
    own = generated(v3, ids, mask, **more)
    with attach(v3):
        ours = generated(v3, ids, mask, **more)
    if way == "beams":
        assert torch.equal(ours[0], own[0])
    prompt = own[0].shape[1] - len(own[1])
    for at, (got, want) in enumerate(zip(ours[1], own[1], strict=True), prompt + 1):
        close(got, want)
        # What follows another choice between two tokens as likely says nothing.
        if not torch.equal(ours[0][:, :at], own[0][:, :at]):
            assert at > prompt + 2
            break


@torch.no_grad()
def test_forks_crops_files_and_known_prompts_hold_rows(v3, tmp_path):
    ids = tokens(1, 80)
    own = v3(ids).logits
    with attach(v3) as attached:
        cache = attached.new_cache()
        stepwise(v3, cache, ids, [50])
        other = cache.fork()
        close(stepwise(v3, other, ids[:, 50:], [30]), own[:, 50:])
        other.crop(60)
        close(stepwise(v3, other, ids[:, 60:], [20]), own[:, 60:])
        attached.save_cache(cache, tmp_path / "cache")
        loaded = attached.load_cache(tmp_path / "cache")
        close(stepwise(v3, loaded, ids[:, 50:], [1, 30]), own[:, 50:])
        prompts = attached.prompts()
        assert prompts.learn(ids[:, :70]) == 70 // PAGE
        known = prompts.new_cache(ids)
        assert known.get_seq_length() == 70 // PAGE * PAGE
        close(stepwise(v3, known, ids[:, 64:], [16]), own[:, 64:])


class Rounding(DynamicLayer):
    """Transformers' own cache of rows that are rounded as ours are, before they are expanded."""

    def update(self, key, value, *args, **kwargs):
        spec = FORMATS["int8"].key
        seen = [rotate(dequantize(*quantize(rotate(x), spec), spec, x.dtype)) for x in (key, value)]
        return super().update(*seen, *args, **kwargs)


@torch.no_grad()
def test_int8_is_the_models_own_attention_over_rounded_rows(model):
    ids, ends = tokens(2, 70), [40, 41, 70]
    control = DynamicCache(config=model.config)
    control.layers = [Rounding() for _ in control.layers]
    want = stepwise(model, control, ids, ends)
    exact = model(ids).logits
    with attach(model, "int8") as attached:
        got = stepwise(model, attached.new_cache(), ids, ends)
    loss = (want - exact).norm()
    # Scales are kept in 16 bits by both; codes flip where a sum before them was on a tie.
    assert 0 < loss < 0.2 * exact.norm()
    assert (got - want).norm() < 0.05 * loss


@pytest.mark.parametrize("name", ["int8_exact", "int4", "k8v4"])
@torch.no_grad()
def test_pages_near_a_query_are_exact(v3, name):
    """Everything that the last token sees is in the first page, its own or the one before."""
    ids = tokens(1, 3 * PAGE)
    with attach(v3, name) as attached:
        got = stepwise(v3, attached.new_cache(), ids, [20, 3 * PAGE])
    close(got, v3(ids).logits)


@torch.no_grad()
def test_bytes_are_those_of_a_row_and_a_rotary_key(v3):
    with attach(v3, "int8") as attached:
        cache = attached.new_cache()
        stepwise(v3, cache, tokens(2, 50), [50])
        cache.flush()
        layers = cache_shape(v3.config).layers(LayerFormats.parse("int8"), PAGE)
        assert [each.layout.latent for each in layers] == [True] * 3
        assert [each.layout.bytes_per_token() for each in layers] == [48 + 2 + 16 + 2] * 3
        assert cache.used_bytes() == 2 * held_bytes(layers, 50) == 2 * 3 * 64 * 68
        assert cache.layers[0].layout.bytes_per_token() == 68


def test_no_key_map_is_made_for_latent_rows(monkeypatch):
    """Some have norms beside their attention that are called as those of keys."""
    monkeypatch.setattr(key_maps, "has_uneven_key_norms", lambda _: True)
    with quantpage.attach(build("v2"), page_size=PAGE) as attached:
        assert not attached.options.key_maps


def test_gradients_are_the_models_own(v3):
    ids = tokens(1, 30)
    mine = copy.deepcopy(v3)
    wanted = copy.deepcopy(v3)
    wanted(ids, labels=ids).loss.backward()
    with attach(mine):
        mine(ids, labels=ids, use_cache=True).loss.backward()
    for (name, ours), theirs in zip(mine.named_parameters(), wanted.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name


class Adapted(nn.Module):
    """A linear layer that somebody wrapped (LoRA)."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x):
        return self.inner(x) * 1.25


@pytest.mark.parametrize("when", ["before", "while"])
@torch.no_grad()
def test_weights_that_are_more_than_a_product_are_expanded_and_say_so(v3, when):
    model, ids = copy.deepcopy(v3), tokens(1, 40)

    def adapt():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = Adapted(layer.self_attn.kv_b_proj)

    if when == "before":
        adapt()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attached = quantpage.attach(model, "none", page_size=PAGE)
        if when == "while":
            adapt()
        with attached:
            got = stepwise(model, attached.new_cache(), ids, [30, 40])
            found = attached.coverage
    assert len([each for each in said if each.category is PartlyPaged]) == 1
    assert found.latent == found.paged == 0 and "no plain linear layer" in found.dense[0][0]
    close(got, model(ids).logits)


@torch.no_grad()
def test_int8_weights_are_multiplied_by_what_they_stand_for(v3):
    model, ids = copy.deepcopy(v3).float(), tokens(1, 40)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Int8Linear(layer.self_attn.kv_b_proj)
    own = model(ids).logits
    for layer in model.model.layers:
        inner = layer.self_attn.kv_b_proj
        exact = nn.Linear(inner.in_features, inner.out_features, bias=False)
        exact.weight.copy_(inner.weight.float() * inner.scale.float()[:, None])
        layer.self_attn.wanted = exact
    with attach(model) as attached:
        got = stepwise(model, attached.new_cache(), ids, [40])
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = layer.self_attn.wanted
    want = model(ids).logits
    # The layer itself rounds what it multiplies to bfloat16.
    assert (got - want).norm() < 1e-4 * want.norm() < (own - want).norm()


def test_what_rows_cannot_have_is_refused_before_anything_changes(v3):
    for name in ("int8_static", "int8,first1=fp8_static"):
        with pytest.raises(FormatError, match="layer 0, which caches latent rows"):
            quantpage.attach(v3, name, page_size=PAGE)

    class PerHead(CausalMask):
        heads = 4

    with pytest.raises(ValueError, match="rows for 1 or 1 kv_heads, got 4"):
        quantpage.attach(v3, "int8", mask=PerHead())
    assert all("expand_kv" not in vars(each.self_attn) for each in v3.model.layers)
    attached = attach(v3, "int8")
    assert all("expand_kv" in vars(each.self_attn) for each in v3.model.layers)
    attached.detach()
    assert all("expand_kv" not in vars(each.self_attn) for each in v3.model.layers)
