"""Where an attached model is its own: gradients, training, masks that no kernel knows, refusals."""

import pytest
import torch
import transformers as tf

import quantpage
from quantpage import masks
from quantpage.errors import CacheError, PartlyPaged, UnsupportedModel
from quantpage.integrations.hf_transformers.hooks import functions
from quantpage.integrations.hf_transformers.modules.arguments import cache_as
from quantpage.masks import ColumnIntervals
from scripts.tiny_classes import build
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    run().backward()
    return {name: each.grad for name, each in model.named_parameters()}


def foreign():
    """A model whose attention is not a function that its configuration names."""
    torch.manual_seed(0)
    config = tf.BloomConfig(
        vocab_size=128, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.25
    )
    return tf.BloomForCausalLM(config).eval()


@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3_window", "qwen2_bias"])
def test_gradients_in_evaluation_mode_are_the_model_s_own(name, own):
    model, ids = tiny(name, torch.float32), tokens(2, 40)
    model.set_attn_implementation(own)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    labels = ids.clone()
    # The first token is not predicted: what a padding query says is nobody's business.
    labels[0, :10] = -100

    def loss():
        return model(ids, attention_mask=mask, labels=labels).loss

    wanted = gradients(model, loss)
    with quantpage.attach(model, kv_format="none", page_size=16):
        got = gradients(model, loss)
    for each in wanted:
        torch.testing.assert_close(got[each], wanted[each], atol=1e-3, rtol=1e-2)
    with quantpage.attach(model, kv_format="int8", page_size=16):
        near = gradients(model, loss)
        with torch.no_grad():
            alone = loss()
        # Of a number at a border one of the two may round another way: up to 3e-4 in ten texts, of
        # which int8 itself moves 1e-2.
        assert abs(loss() - alone) < 5e-4
    far = [(near[each] - wanted[each]).norm() / wanted[each].norm() for each in wanted]
    assert max(far) < 0.2


def test_gradients_of_embeddings_through_frozen_weights():
    model, ids = tiny("llama", torch.float32), tokens(1, 5)
    model.requires_grad_(False)

    def gradient():
        given = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=given, labels=ids).loss.backward()
        return given.grad

    wanted = gradient()
    with quantpage.attach(model, kv_format="none"):
        got = gradient()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def test_gradients_of_a_model_with_attention_of_its_own():
    model, ids = foreign(), tokens(2, 40)
    wanted = gradients(model, lambda: model(ids, labels=ids).loss)
    with pytest.warns(PartlyPaged, match="0 of 2 layers read pages.*its own code"):
        attached = quantpage.attach(model, kv_format="none")
    with attached:
        got = gradients(model, lambda: model(ids, labels=ids).loss)
    for each in wanted:
        torch.testing.assert_close(got[each], wanted[each], atol=1e-3, rtol=1e-2)


def test_a_gradient_through_cached_tokens_is_refused_when_it_is_asked_for():
    model, ids = tiny("llama"), tokens(1, 40)
    with quantpage.attach(model, kv_format="none") as attached:
        cache = attached.new_cache()
        model(ids[:, :30], past_key_values=cache)
        with torch.no_grad():
            wanted = model(ids).logits[:, 30:]
        out = model(ids[:, 30:], past_key_values=cache)
        torch.testing.assert_close(out.logits, wanted, atol=1e-8, rtol=0)
        with pytest.raises(RuntimeError, match="expected all tokens of a gradient in one forward"):
            out.logits.sum().backward()


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2_softcap_window"])
def test_training_and_a_forward_without_cache_are_the_model_s_own(name):
    model, ids = tiny(name, torch.float32), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    wanted = model(ids, attention_mask=mask, use_cache=False).logits
    with quantpage.attach(model, kv_format="int4", page_size=16):
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, wanted)
        model.train()
        assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
        shown = model.eval()(ids, use_cache=False, output_attentions=True)
    assert len(shown.attentions) == 3


@pytest.mark.parametrize("given", ["bool", "float"])
def test_a_padded_prompt_under_a_mask_of_all_pairs_goes_on_with_a_plain_one(given):
    model, ids = tiny("llama"), tokens(2, 40)
    two = torch.ones(2, 41, dtype=torch.long)
    two[1, :7] = 0
    four = torch.ones(40, 40, dtype=torch.bool).tril()[None, None] & two[:, None, None, :40].bool()
    if given == "float":
        four = torch.zeros(four.shape, dtype=torch.float64).masked_fill(~four, -torch.inf)
    positions = (two.cumsum(1) - 1).clamp(min=0)
    with quantpage.attach(model, kv_format="none", page_size=16), torch.inference_mode():
        plain = model(ids, attention_mask=two[:, :40], position_ids=positions[:, :40])
        last = {"attention_mask": two, "position_ids": positions[:, 40:]}
        wanted = model(ids[:, :1], **cache_as(model, plain.past_key_values), **last).logits
        with pytest.warns(PartlyPaged):
            out = model(ids, attention_mask=four, position_ids=positions[:, :40])
        got = model(ids[:, :1], **cache_as(model, out.past_key_values), **last).logits
        with pytest.raises(CacheError, match="was cached as padding"):
            again = torch.ones(2, 42, dtype=torch.long)
            again[1, :3] = 0
            model(ids[:, :1], **cache_as(model, out.past_key_values), attention_mask=again)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_a_mask_that_is_too_short_says_so():
    model, ids = tiny("llama"), tokens(2, 30)
    with quantpage.attach(model) as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"expected 35 tokens .* 5 new, got 5"):
            model(ids[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache)


def masked(model, mask, **arguments):
    return quantpage.attach(model, kv_format="none", backend="flash_mask", mask=mask, **arguments)


def test_a_mask_is_applied_or_refused():
    model, ids, mask = tiny("llama"), tokens(1, 40), masks.prefix_lm(40, 20)
    causal = model(ids).logits
    with masked(model, mask), torch.inference_mode():
        assert (model(ids).logits - causal).abs().max() > 1
        with pytest.raises(ValueError, match=r"mask: expected a forward with a cache.*use_cache"):
            model(ids, use_cache=False)
        with pytest.raises(ValueError, match="mask: expected a model whose layers all read pages"):
            model(ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
    with masked(model, mask):
        with pytest.raises(ValueError, match=r"mask: expected a forward with a cache.*training"):
            model.train()(ids)
        with pytest.raises(ValueError, match=r"mask: expected a forward under torch"):
            model.eval()(ids)
    with pytest.raises(ValueError, match="mask: expected a model whose layers all read pages"):
        masked(foreign(), mask)
    with pytest.raises(ValueError, match=r"mask: expected a model without windows.*\[0, 2\]"):
        masked(tiny("gemma3_window"), mask)
    heads = torch.full((1, 4, 20, 1), 20, dtype=torch.int32)
    with pytest.raises(ValueError, match="mask: expected rows for 1 or 2 kv_heads, got 4"):
        masked(model, ColumnIntervals(heads))
    assert model.config._attn_implementation == "eager" and not model._forward_pre_hooks


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_is_refused(inner):
    model = tiny("llama")
    part = model.model if inner else model
    part.forward = torch.compile(part.forward)
    with pytest.raises(UnsupportedModel, match="expected one that is not compiled"):
        quantpage.attach(model)
    del part.forward
    part.compile()
    with pytest.raises(UnsupportedModel, match="expected one that is not compiled"):
        quantpage.attach(model)


@pytest.mark.parametrize("way", ["model", "forward", "module"])
def test_a_model_that_is_compiled_while_attached_runs_as_it_is(way):
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8") as attached, torch.no_grad():
        wanted = model(ids).logits
        if way == "model":
            called = torch.compile(model)
        else:
            called = model
            if way == "module":
                model.compile()
            else:
                model.forward = torch.compile(model.forward)
        cache = attached.new_cache()
        called(ids[:, :29], past_key_values=cache)
        got = called(ids[:, 29:], past_key_values=cache).logits
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(got, wanted[:, 29:], atol=1e-8, rtol=0)


def test_a_cache_that_a_model_makes_itself_in_training_is_its_own():
    # The outer model makes one and gives it to the language model in it.
    model, ids = build("idefics2", "Idefics2ForConditionalGeneration"), tokens(1, 20)
    model.train()
    wanted = gradients(model, lambda: model(input_ids=ids, labels=ids).loss)
    with quantpage.attach(model, kv_format="int8") as attached:
        got = gradients(model, lambda: model(input_ids=ids, labels=ids).loss)
        model.eval()
        assert model(input_ids=ids).past_key_values.formats == attached.new_cache().formats
    for name, each in wanted.items():
        assert (got[name] is None) == (each is None), name
        assert each is None or torch.equal(got[name], each), name


def test_pictures_of_idefics_beside_pages():
    # It keeps a number where others keep a configuration.
    model, ids = build("idefics", "IdeficsForVisionText2Text"), tokens(1, 20)
    size = model.config.vision_config.image_size
    given = {
        "pixel_values": torch.randn(1, 1, 3, size, size),
        "image_attention_mask": torch.ones(1, 20, 1, dtype=torch.long),
        "attention_mask": torch.ones_like(ids),
    }
    with torch.no_grad():
        wanted = model(input_ids=ids, **given).logits
        with quantpage.attach(model, kv_format="none") as attached:
            out = model(input_ids=ids, **given)
            assert attached.coverage.whole and out.past_key_values.used_bytes()
    torch.testing.assert_close(out.logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
def test_pictures_that_a_model_puts_before_its_text_by_itself():
    # GIT: no mask tells of their tokens.
    model, ids = build("git", "GitForCausalLM"), tokens(1, 20)
    size = model.config.vision_config.image_size
    arguments = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False,
        "pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),
        "max_new_tokens": 6, "min_new_tokens": 6,
    }  # fmt: skip
    wanted = model.generate(**arguments)
    with quantpage.attach(model, kv_format="none"):
        assert torch.equal(model.generate(**arguments), wanted)
        arguments["attention_mask"][0, :3] = 0
        with pytest.raises(ValueError, match="attention_mask: expected 37 tokens a row"):
            model.generate(**arguments)


def test_an_encoder_s_states_are_refused_beside_a_cache():
    config = tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, add_cross_attention=True)
    model, ids = tf.GPT2LMHeadModel(config).eval(), tokens(1, 20)
    states = torch.randn(1, 7, 64)
    wanted = model(ids, encoder_hidden_states=states, use_cache=False).logits
    with quantpage.attach(model):
        with pytest.raises(ValueError, match="encoder_hidden_states: expected None while a model"):
            model(ids, encoder_hidden_states=states)
        got = model(ids, encoder_hidden_states=states, use_cache=False).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("way", ["model", "body", "configuration"])
def test_another_attention_is_refused_while_a_model_is_attached(way):
    model, ids = tiny("llama"), tokens(1, 30)
    changes = {
        "model": lambda: model.set_attn_implementation("sdpa"),
        "body": lambda: model.model.set_attn_implementation("sdpa"),
        "configuration": lambda: setattr(model.config, "_attn_implementation", "sdpa"),
    }
    with quantpage.attach(model, kv_format="int8") as attached, torch.no_grad():
        wanted = model(ids).logits
        with pytest.raises(ValueError, match="attn_implementation: expected 'quantpage' while a"):
            changes[way]()
            model(ids)
        model.config._attn_implementation = "quantpage"
        assert torch.equal(model(ids).logits, wanted) and attached.coverage.whole
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_encoders_may_be_given_another_attention():
    model = build("gemma3", "Gemma3ForConditionalGeneration")
    with quantpage.attach(model, kv_format="int8"):
        with pytest.raises(ValueError, match="attn_implementation: expected 'quantpage'"):
            model.set_attn_implementation("sdpa")
        assert model.config.vision_config._attn_implementation == "eager"
        model.set_attn_implementation({"vision_config": "sdpa"})
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("rows, pad", [(1, 0), (2, 0), (2, 3)])
def test_bloom_in_batches(rows, pad):
    model, ids = foreign(), tokens(rows, 20)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **arguments)
    with pytest.warns(PartlyPaged, match="its own code"):
        attached = quantpage.attach(model, kv_format="none")
    with attached:
        assert model.generate(ids, **arguments).tolist() == wanted.tolist()


def test_rules_are_read_from_transformers_mask_functions():
    from transformers import masking_utils as made

    rule = functions.rule_of
    assert rule(made.causal_mask_function) == functions.Rule()
    assert rule(made.sliding_window_causal_mask_function(7)) == functions.Rule(window=7)
    chunks = made.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64))
    assert rule(chunks) == functions.Rule(chunk=8)
    assert rule(made.bidirectional_mask_function) == functions.Rule(causal=False)
    assert rule(made.or_masks(made.causal_mask_function, made.bidirectional_mask_function)) is None
    assert rule(made.and_masks(made.causal_mask_function, lambda *index: True)) is None
    assert rule(made.sliding_window_bidirectional_mask_function(3)) is None


def test_chunks_are_documents_of_equal_length():
    assert functions.Rule(chunk=8).mask(8) == functions.Rule().mask(8)
    seen = functions.Rule(chunk=8).mask(21).materialize(torch.arange(21), 21)
    at = torch.arange(21)
    assert torch.equal(seen, (at[:, None] >= at) & (at[:, None] // 8 == at // 8))


@pytest.mark.parametrize("implementation", [None, "torch"])
@pytest.mark.parametrize("flag", ["configuration", "modules"])
def test_a_decoder_that_is_made_to_see_what_follows_does(flag, implementation):
    """Embedding models are decoders with this flag; the modules' counts without padding alone."""
    ids, padded = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    padded[0, :9] = 0
    models = [tiny("llama", torch.float32) for _ in range(2)]
    for each in models:
        each.set_attn_implementation("sdpa")

    def see(model):
        flagged = [each.self_attn for each in model.model.layers]
        for each in flagged if flag == "modules" else [model.config]:
            each.is_causal = False

    see(models[0])
    options = {"kv_format": "none", "page_size": 16, "implementation": implementation}
    # Before it is attached, and after.
    with quantpage.attach(models[1], **options), torch.inference_mode():
        causal = models[1](ids).logits
        see(models[1])
        later = [models[1](ids, attention_mask=each).logits[1] for each in (None, padded)]
    with torch.inference_mode():
        wanted = [models[0](ids, attention_mask=each).logits[1] for each in (None, padded)]
        with quantpage.attach(models[0], **options):
            got = [models[0](ids, attention_mask=each).logits[1] for each in (None, padded)]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(later, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted[0] - causal[1]).norm() > 0.1 * causal[1].norm()
