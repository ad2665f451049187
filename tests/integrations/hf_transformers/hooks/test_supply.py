"""Which cache a forward and a generate of an attached model use: ours, or an error."""

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

import quantpage
from quantpage.errors import CacheError, UnsupportedModel
from quantpage.integrations.hf_transformers import QuantPageCache
from quantpage.integrations.hf_transformers.modules.arguments import (
    cache_argument,
    cache_as,
    caches_in,
)
from quantpage.masks import CausalMask
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu
NAMES = ("cache", "past_key_values")


def paged_bytes(cache):
    assert type(cache) is QuantPageCache
    return cache.used_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_taken_by_both_names(name):
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8") as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(ids, **{name: cache})
        assert cache.get_seq_length() == 30
        model.generate(tokens(1, 40), **{name: cache}, max_new_tokens=2, min_new_tokens=2)
        assert cache.get_seq_length() == 41
        with pytest.raises(ValueError, match="expected one cache, got another one"):
            model(ids, cache=cache, past_key_values=attached.new_cache())


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_generate_runs_on_pages(arguments):
    model, ids = tiny("llama"), tokens(1, 12).repeat(1, 3)
    with quantpage.attach(model, kv_format="int8"):
        out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **arguments)
    (cache,) = caches_in(out)
    assert 0 < paged_bytes(cache) < cache.unquantized_bytes()


def test_a_cache_at_its_place_among_the_arguments_without_names():
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8") as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(ids, None, None, cache)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_the_user_is_refused_in_forward_and_generate(name, inner):
    model, ids = tiny("llama"), tokens(1, 30)
    called = model.model if inner else model
    with quantpage.attach(model):
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            with pytest.raises(ValueError, match="expected None or a cache of this attachment"):
                called(ids, **{name: cache})
            with pytest.raises(ValueError, match="expected None or a cache of this attachment"):
                model.generate(ids, **{name: cache}, max_new_tokens=2)
            assert cache.get_seq_length() == 0
    assert called(ids, **cache_as(called, DynamicCache()))


def test_a_cache_of_another_model_is_refused():
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(tiny("llama"), kv_format="int8") as attached, torch.no_grad():
        other = attached.new_cache()
        attached.model(ids, **cache_as(model, other))
    with quantpage.attach(model, kv_format="int8") as attached, torch.no_grad():
        with pytest.raises(ValueError, match="expected a cache of this model, got one of another"):
            model(ids, **cache_as(model, other))
        wanted = model(ids).logits[:, 20:]
        cache = attached.new_cache()
        model(ids[:, :20], **cache_as(model, cache))
    # The same model again, and a part of it.
    for part in (model, model.model):
        with quantpage.attach(part, kv_format="int8"), torch.no_grad():
            cache.crop(20)
            model(ids[:, 20:], **cache_as(model, cache))
    with quantpage.attach(model, kv_format="int8"), torch.no_grad():
        cache.crop(20)
        torch.testing.assert_close(model(ids[:, 20:], **cache_as(model, cache)).logits, wanted)


@pytest.mark.parametrize(
    "other", [{"kv_format": "none"}, {"kv_format": "int8", "mask": CausalMask(window=4)}]
)
def test_a_cache_of_another_rule_is_refused(other):
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8") as attached:
        cache = attached.new_cache()
        model(ids, **cache_as(model, cache))
    with quantpage.attach(model, **other), torch.inference_mode():
        with pytest.raises(ValueError, match="expected a cache of this attachment, of"):
            model(ids, **cache_as(model, cache))
        with pytest.raises(ValueError, match="expected a cache of this attachment, of"):
            model.generate(tokens(1, 40), **cache_as(model, cache), max_new_tokens=2)
    # Attached again as it was, it goes on.
    with quantpage.attach(model, kv_format="int8"), torch.inference_mode():
        model(ids, **cache_as(model, cache))
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_another_kind_of_cache_is_refused(kind):
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model), pytest.raises(ValueError, match=f"expected none .* '{kind}'"):
        model.generate(ids, max_new_tokens=2, cache_implementation=kind)


def test_the_body_of_a_model_is_attached_too():
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8"), torch.inference_mode():
        (cache,) = caches_in(model.model(ids))
        assert paged_bytes(cache)
        assert caches_in(model(ids, use_cache=False)) == []
        assert caches_in(model.model(ids, use_cache=False)) == []


def test_attention_weights_are_refused_where_pages_are_read():
    model, ids = tiny("llama"), tokens(1, 30)
    wanted = model(ids, output_attentions=True).attentions
    with quantpage.attach(model):
        with pytest.raises(ValueError, match="output_attentions: expected False"):
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions: expected False"):
            model.generate(
                ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
            )
    assert len(wanted) == 3
    model.config.output_attentions = True
    with quantpage.attach(model):
        with pytest.raises(ValueError, match="output_attentions: expected False"):
            model(ids)
        assert model(ids, output_attentions=False).attentions is None
        assert len(model(ids, use_cache=False).attentions) == 3


def test_continuous_batching_is_refused():
    model = tiny("llama")
    with quantpage.attach(model):
        with pytest.raises(ValueError, match="continuous batching keeps a cache of its own"):
            model.generate_batch([[5, 6, 7]])
        with pytest.raises(ValueError, match="continuous batching keeps a cache of its own"):
            model.generate(tokens(1, 9), cache_implementation="paged")
    assert "init_continuous_batching" not in vars(model)


def test_a_mask_of_another_batch_is_refused():
    model, ids = tiny("llama"), tokens(2, 30)
    with quantpage.attach(model):
        for rows in (1, 3):
            with pytest.raises(ValueError, match=f"attention_mask: expected 2 rows.* got {rows}"):
                model(ids, attention_mask=torch.ones(rows, 30, dtype=torch.long))
        with pytest.raises(
            ValueError, match=r"mask: expected \[rows, tokens\].* got \(2, 30, 30\)"
        ):
            model(ids, attention_mask=torch.ones(2, 30, 30, dtype=torch.long))


@pytest.mark.parametrize("told", ["ones", "moved", "in one row"])
def test_a_mask_that_takes_cached_padding_for_tokens_is_refused(told):
    model, ids, more = tiny("llama"), tokens(2, 30), tokens(2, 3, seed=5)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    other = torch.ones(2, 33, dtype=torch.long)
    if told == "moved":
        other[:, 3:10] = 0
    if told == "in one row":
        other[0, :7] = 0
    right = torch.cat([mask, torch.ones_like(more)], 1)
    with quantpage.attach(model, page_size=16), torch.inference_mode():
        wanted = model(torch.cat([ids, more], 1), attention_mask=right).logits[:, 30:]
        cache = model(ids, attention_mask=mask).past_key_values
        with pytest.raises(CacheError, match=r"attention_mask: row \d, token \d was cached as pa"):
            model(more, attention_mask=other, past_key_values=cache)
        assert cache.get_seq_length() == 30
        # The same again, or none: what is cached is known.
        for again in (right, None):
            got = model(more, attention_mask=again, past_key_values=cache.fork()).logits
            torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)


class _Forgetful(tf.LlamaForCausalLM):
    """Makes a cache of its own."""

    def forward(self, input_ids=None, past_key_values=None, cache=None, **kwargs):
        mine = DynamicCache()
        kwargs["use_cache"] = True
        out = tf.LlamaForCausalLM.forward(self, input_ids, **cache_as(self.model, None), **kwargs)
        out[cache_argument(self.model)] = mine
        return out


def test_a_forward_that_leaves_our_cache_empty_raises():
    model, ids = _Forgetful(tf.LlamaConfig(**COMMON)).eval(), tokens(1, 30)
    assert model(ids) is not None
    with quantpage.attach(model), pytest.raises(UnsupportedModel, match="_Forgetful: expected it"):
        model(ids)


def test_an_error_in_a_forward_leaves_no_trace():
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="none"), torch.inference_mode():
        wanted = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 1000)
        assert torch.equal(model(ids).logits, wanted)
        assert caches_in(model.model(ids))


@pytest.mark.parametrize("draft", ["prompt_lookup", "assistant"])
def test_drafts_go_on_behind_a_kept_cache(draft):
    model, ids = tiny("llama"), tokens(1, 11).repeat(1, 3)
    drafts = {"prompt_lookup_num_tokens": 3}
    if draft == "assistant":
        drafts = {"assistant_model": tiny("multi_query")}
    with quantpage.attach(model, kv_format="int8") as attached, torch.inference_mode():
        wanted = model.generate(ids, max_new_tokens=6)
        cache = attached.new_cache()
        model(ids[:, :20], **cache_as(model, cache))
        got = model.generate(ids, **cache_as(model, cache), max_new_tokens=6, **drafts)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("given", [20, 30])
def test_a_prompt_that_the_cache_holds_already_says_so(given):
    model, ids = tiny("llama"), tokens(1, 30)
    with quantpage.attach(model, kv_format="int8") as attached, torch.inference_mode():
        wanted = model.generate(ids[:, :given], max_new_tokens=3)
        cache = attached.new_cache()
        model(ids, **cache_as(model, cache))
        with pytest.raises(ValueError, match=rf"of more than the 30 tokens .* got {given}; crop"):
            model.generate(ids[:, :given], **cache_as(model, cache), max_new_tokens=3)
        cache.crop(given - 1)
        got = model.generate(ids[:, :given], **cache_as(model, cache), max_new_tokens=3)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_a_cache_goes_on_after_prompt_lookup(kv_format):
    model, ids = tiny("llama"), tokens(1, 12).repeat(1, 3)
    with quantpage.attach(model, kv_format=kv_format, page_size=16) as attached:
        cache = attached.new_cache()
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=16, do_sample=False,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
        longer = torch.cat([out, tokens(1, 9, seed=5)], 1)
        with torch.inference_mode():
            wanted = model(longer).logits[:, -1]
            for at in range(cache.get_seq_length(), longer.shape[1]):
                got = model(longer[:, at : at + 1], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)


def test_an_assistant_reads_what_a_model_hands_out_of_its_cache():
    """Gemma 4's own drafters attend to their model's keys, after its next tokens are taken back."""
    own = COMMON | {
        "sliding_window": 24,
        "head_dim": 32,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    torch.manual_seed(0)
    model = tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**own, num_kv_shared_layers=0)).eval()
    drafts = tf.Gemma4TextConfig(**own, num_kv_shared_layers=2)
    config = tf.Gemma4AssistantConfig(text_config=drafts, backbone_hidden_size=own["hidden_size"])
    assistant = tf.Gemma4AssistantForCausalLM(config).eval()
    assistant.generation_config.num_assistant_tokens = 3
    read = []
    assistant.register_forward_pre_hook(
        lambda _, args, given: read.append(given["shared_kv_states"]["full_attention"]),
        with_kwargs=True,
    )

    def answer(**given):
        read.clear()
        made = model.generate(
            tokens(1, 40), max_new_tokens=12, min_new_tokens=12, do_sample=False, **given
        )
        # The newest key may be a draft's that was not taken.
        return made, [each[:, :, :-1].clone() for pair in read for each in pair]

    wanted, keys = answer(assistant_model=assistant)
    with quantpage.attach(model, "none", page_size=16) as attached:
        got, paged = answer(assistant_model=assistant)
        assert attached.coverage.paged == 2
    assert torch.equal(got, wanted)
    torch.testing.assert_close(paged, keys)
    with quantpage.attach(model, "int8", page_size=16):
        assert torch.equal(answer(assistant_model=assistant)[0], answer()[0])
