"""A file or a prompt's pages serve again only where keys and values would be the same."""

import pytest
import torch
import transformers as tf

import quantpage
from quantpage import masks
from quantpage.errors import CorruptCache, UnsupportedModel
from quantpage.integrations.hf_transformers.cache.prompts import _placeholders
from quantpage.integrations.hf_transformers.modules.digest import model_digest
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu
PAGE = 16
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def llama(**changes):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**{**COMMON, **changes})).eval()


def changed(change):
    model = llama()
    with torch.no_grad():
        change(model)
    return model


OTHERS = {
    "base of the rotation": lambda: llama(rope_parameters={**ROPE, "rope_theta": 1e6}),
    "scaled rotation": lambda: llama(
        rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}
    ),
    "epsilon": lambda: llama(rms_norm_eps=1e-2),
    "one number": lambda: changed(lambda m: m.model.layers[1].mlp.down_proj.weight[3, 5].mul_(2)),
    "one bit": lambda: changed(
        lambda m: m.model.embed_tokens.weight.view(torch.int32)[50, 3].bitwise_xor_(1)
    ),
    "two numbers exchanged": lambda: changed(
        lambda m: m.model.norm.weight.copy_(torch.arange(64.0)[torch.randperm(64)])
    ),
    "columns negated, through .data": lambda: changed(
        lambda m: m.model.layers[0].self_attn.k_proj.weight.data[:, 1::3].mul_(-1)
    ),
    "a buffer": lambda: changed(lambda m: m.model.rotary_emb.inv_freq.mul_(1.01)),
    "a module's own scaling": lambda: changed(
        lambda m: setattr(m.model.layers[2].self_attn, "scaling", 0.5)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model(name, tmp_path):
    with quantpage.attach(llama(), page_size=PAGE) as attached:
        cache = attached.new_cache()
        attached.model(tokens(1, 40), past_key_values=cache)
        attached.save_cache(cache, tmp_path / "cache")
        attached.load_cache(tmp_path / "cache")
    with (
        quantpage.attach(OTHERS[name](), page_size=PAGE) as attached,
        pytest.raises(CorruptCache, match="expected pages of this model"),
    ):
        attached.load_cache(tmp_path / "cache")


def test_the_same_model_however_it_came_to_be(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model_digest(loaded) == model_digest(model)
    model.config.use_cache = False
    model.train()
    assert model_digest(loaded) == model_digest(model)


def test_masks():
    digests = {model_digest(llama(), mask) for mask in (
        None, masks.prefix_lm(120, 100), masks.prefix_lm(120, 90), masks.CausalMask(window=9),
    )}  # fmt: skip
    assert len(digests) == 4


def test_weights_that_are_elsewhere():
    with pytest.raises(UnsupportedModel, match="expected a weight whose bytes can be read"):
        model_digest(llama().to("meta"))


def test_a_mask_that_looks_ahead_is_refused():
    def prompts(mask):
        model = tiny("llama")
        with quantpage.attach(model, backend="flash_mask", mask=mask, page_size=PAGE) as attached:
            return attached.prompts()

    with pytest.raises(UnsupportedModel, match="no token sees a later one"):
        prompts(masks.prefix_lm(120, 100))
    # However far into the prompt, and in whatever form it is said.
    spans = masks.image_spans(3000, [(2500, 2900)])
    rows = torch.stack([torch.zeros(40), torch.arange(40) + 1], -1).int().view(1, 1, 40, 1, 2)
    rows[:, :, 30, :, 1] = 33
    for mask, first in ((spans, 2501), (masks.RowIntervals(rows), 31), (masks.FullMask(), 1)):
        with pytest.raises(UnsupportedModel, match=f"tokens before {first} see"):
            prompts(mask)
    prompts(masks.CausalMask(window=30, sink_tokens=2))
    prompts(masks.causal_document([40, 80]))


def test_a_rotation_that_the_length_scales():
    def model(kind, **more):
        config = tf.LlamaConfig(
            **{**COMMON, "max_position_embeddings": 64},
            rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more},
        )
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config).double().eval()

    longrope = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
                "original_max_position_embeddings": 64}  # fmt: skip
    for made in (model("dynamic", factor=2.0), model("longrope", **longrope)):
        system = tokens(1, 40)
        short, long = (torch.cat([system, tokens(1, n, 2)], 1) for n in (10, 50))
        with quantpage.attach(made, "none", page_size=PAGE) as attached, torch.inference_mode():
            prompts = attached.prompts()
            assert prompts.learn(system) == 2
            for ids, held in ((short, 32), (long, 0), (short, 32)):
                wanted = made(ids).logits[:, -1]
                cache = prompts.new_cache(ids)
                assert cache.get_seq_length() == held
                got = made(ids[:, held:], past_key_values=cache).logits[:, -1]
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
            cache = prompts.new_cache(long)
            made(long, past_key_values=cache)
            assert prompts.remember(long, cache) == 0


def test_salt_and_changed_weights():
    model, system = tiny("llama"), tokens(1, 40)
    with quantpage.attach(model, page_size=PAGE) as attached:
        prompts = attached.prompts()
        assert prompts.learn(system, salt="one adapter") == 2
        assert prompts.new_cache(system).get_seq_length() == 0
        assert prompts.new_cache(system, salt="another").get_seq_length() == 0
        assert prompts.new_cache(system, salt="one adapter").get_seq_length() == 32
        next(iter(dict(prompts._known.items()).values())).check()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        assert prompts.new_cache(system, salt="one adapter").get_seq_length() == 0
        assert len(prompts) == 0


PICTURE = 99


def gemma3():
    """Whose pictures are sixteen tokens that see each other."""
    text = {
        **COMMON, "head_dim": 16, "sliding_window": 24, "layer_types": ["full_attention"] * 2,
        "num_hidden_layers": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=PICTURE,
        boi_token_index=97, eoi_token_index=98,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@pytest.mark.parametrize("before, after", [(8, 8), (15, 30), (22, 8), (16, 8), (30, 20)])
def test_pictures_are_found_whole_and_all_or_not_at_all(before, after):
    """What is remembered ends within the picture, or with the last full page."""
    model, text = gemma3(), tokens(1, 60).clamp(3, 90)
    picture, end = torch.full((1, 16), PICTURE), before + 16
    ids = torch.cat([text[:, :before], picture, text[:, before : before + after]], 1)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    seen = {"pixel_values": pixels, "token_type_ids": (ids == PICTURE).long()}
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    asked["return_dict_in_generate"] = True
    with quantpage.attach(model, "none", page_size=PAGE) as attached, torch.inference_mode():
        prompts = attached.prompts()
        cache = prompts.new_cache(ids, salt="that one")
        wanted = model.generate(ids, past_key_values=cache, **seen, **asked)
        for known in (ids[:, : end - 1], ids):
            prompts.remember(known, cache, salt="that one")
            found = prompts.new_cache(ids, salt="that one")
            full = min(known.shape[1], ids.shape[1] - 1) // PAGE * PAGE
            held = full if full >= end else 0
            assert found.get_seq_length() == held
            assert prompts.new_cache(ids, salt="another").get_seq_length() == 0
            given = {} if held else seen
            got = model.generate(ids, past_key_values=found, **given, **asked)
            assert torch.equal(got.sequences, wanted.sequences)
            for mine, theirs in zip(got.logits, wanted.logits, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=f"ids: expected text to learn, .* 99, at {before}"):
            prompts.learn(ids, salt="that one")


def test_what_is_no_plain_prompt_is_not_remembered():
    model, ids = tiny("llama"), tokens(1, 40)
    with quantpage.attach(model, page_size=PAGE) as attached:
        prompts = attached.prompts()
        cache = prompts.new_cache(ids)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="cache: expected one row without padding"):
            prompts.remember(ids, cache)


def test_pictures_are_no_tokens():
    assert _placeholders(tf.LlamaConfig()) is None
    found = _placeholders(tf.LlavaConfig(image_token_index=77))
    assert found is not None and 77 in found and 5 not in found
