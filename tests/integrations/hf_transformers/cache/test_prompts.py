"""Prompts that were computed before give what computing them again would give."""

import gc
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

import quantpage
from quantpage.engine import Engine, Limits
from quantpage.errors import CacheError, CorruptCache, PartlyPaged, UnsupportedModel
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.loading.model import load_model
from scripts.tiny_classes import build
from tests.integrations.hf_transformers.cache.prompt_cases import FORMS, PAGE, QUESTIONS, SYSTEM
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu

MODEL = Path(__file__).parents[4] / "models/smollm2"


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def attached(request, model):
    with quantpage.attach(model, request.param, page_size=PAGE) as made:
        yield made


every_format = pytest.mark.parametrize("attached", FORMS, indirect=True)


def answer(attached, ids, cache):
    """Logits after ``ids``, of which ``cache`` holds a beginning, and of five tokens more."""
    with torch.inference_mode():
        out = attached.model.generate(
            ids.clamp(3, 127), past_key_values=cache, max_new_tokens=5, min_new_tokens=5,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits), out.sequences


def prompts_of(attached):
    system = SYSTEM.clamp(3, 127)
    return system, [torch.cat([system, each.clamp(3, 127)], 1) for each in QUESTIONS]


def same(got, wanted):
    torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=0)
    assert torch.equal(got[1], wanted[1])


@every_format
def test_a_learnt_system_prompt_is_not_computed_again(attached):
    system, asked = prompts_of(attached)
    prompts = attached.prompts()
    assert prompts.learn(system) == 5 and len(prompts) == 5
    assert prompts.learn(system) == 0, "known already"
    for ids in asked:
        cache = prompts.new_cache(ids)
        assert cache.get_seq_length() == 5 * PAGE
        same(answer(attached, ids, cache), answer(attached, ids, attached.new_cache()))


@every_format
def test_a_conversation_is_remembered_turn_by_turn(attached):
    _, (first, second) = prompts_of(attached)
    prompts = attached.prompts()
    cache = prompts.new_cache(first)
    _, said = answer(attached, first, cache)
    prompts.remember(said, cache)
    again = torch.cat([said, second[:, -30:]], 1)
    cache = prompts.new_cache(again)
    assert cache.get_seq_length() == (said.shape[1] - 1) // PAGE * PAGE
    same(answer(attached, again, cache), answer(attached, again, attached.new_cache()))


@every_format
def test_forks_go_their_own_ways(attached):
    system, asked = prompts_of(attached)
    prompt = attached.new_cache()
    attached.model(system, past_key_values=prompt)
    for ids in asked:
        for fork in (prompt.fork(), deepcopy(prompt)):
            same(answer(attached, ids, fork), answer(attached, ids, attached.new_cache()))
    assert prompt.get_seq_length() == system.shape[1]


@every_format
def test_pages_of_forks_that_are_gone_are_used_again(attached):
    system, asked = prompts_of(attached)
    prompt = attached.new_cache()
    attached.model(system, past_key_values=prompt)
    prompt.flush()
    held = prompt.used_bytes()
    gc.disable()
    try:
        for ids in asked:
            answer(attached, ids, prompt.fork())
        assert prompt.used_bytes() == held
    finally:
        gc.enable()


@every_format
def test_saved_and_loaded(attached, tmp_path):
    system, asked = prompts_of(attached)
    prompt = attached.new_cache()
    attached.model(system, past_key_values=prompt)
    attached.save_cache(prompt, tmp_path / "system")
    for ids in asked:
        loaded = attached.load_cache(tmp_path / "system")
        assert loaded.get_seq_length() == system.shape[1]
        assert loaded.used_bytes() == prompt.used_bytes()
        same(answer(attached, ids, loaded), answer(attached, ids, attached.new_cache()))


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
def test_a_model_that_takes_one_token_for_a_step_behind_a_prompt(tmp_path):
    # Of one token GIT asks for positions and a mask.
    model, ids = build("git", "GitForCausalLM"), tokens(1, 21)
    with quantpage.attach(model, "none", page_size=PAGE, max_tokens=21) as attached:
        cache = attached.new_cache()
        with torch.no_grad():
            model(ids[:, :16], past_key_values=cache)
            attached.save_cache(cache, tmp_path / "pages")
            loaded = attached.load_cache(tmp_path / "pages")
            got = model(ids[:, 16:], past_key_values=loaded).logits
            wanted = model(ids[:, 16:], past_key_values=cache).logits
    assert torch.equal(got, wanted)


def test_padded_rows_are_saved_with_their_padding(model, tmp_path):
    ids = tokens(2, 40).clamp(3, 127)
    padding = torch.ones_like(ids)
    padding[1, :13] = 0
    longer = torch.cat([padding, torch.ones(2, 1, dtype=torch.long)], 1)
    with quantpage.attach(model, "int4", page_size=PAGE) as attached:
        cache = attached.new_cache()
        model(ids, attention_mask=padding, past_key_values=cache)
        attached.save_cache(cache, tmp_path / "rows")
        got, wanted = (
            model(ids[:, :1], attention_mask=longer, past_key_values=each).logits
            for each in (attached.load_cache(tmp_path / "rows"), cache)
        )
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


def test_a_file_of_another_model_or_format_is_refused(model, tmp_path):
    path = tmp_path / "file"
    with quantpage.attach(model, "int8", page_size=PAGE) as attached:
        cache = attached.new_cache()
        with pytest.raises(ValueError, match="cache: expected one that holds tokens"):
            attached.save_cache(cache, path)
        model(SYSTEM, past_key_values=cache)
        attached.save_cache(cache, path)
        attached.load_cache(path)
    for name, size, said in (
        ("int8,last1=fp8", PAGE, "layer 2, format: expected fp8, got int8"),
        # What is seen of them first is a number of pages: no reason that anybody can act on.
        ("int4", PAGE, "layer 0, format: expected int4, got int8"),
        ("int8", 2 * PAGE, f"layer 0, page_size: expected {2 * PAGE}, got {PAGE}"),
    ):
        with (
            quantpage.attach(model, name, page_size=size) as attached,
            pytest.raises(CorruptCache, match=said),
        ):
            attached.load_cache(path)
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    with (
        quantpage.attach(other, "int8", page_size=PAGE) as attached,
        pytest.raises(CorruptCache, match="expected pages of this model"),
    ):
        attached.load_cache(path)


def test_the_least_recently_used_pages_go(model):
    with quantpage.attach(model, "int8", page_size=PAGE) as attached:
        prompts = attached.prompts(max_pages=3)
        prompts.learn(SYSTEM)
        assert len(prompts) == 3
        assert prompts.new_cache(SYSTEM).get_seq_length() == 3 * PAGE
        with pytest.raises(ValueError, match="cache: expected one that new_cache"):
            prompts.remember(SYSTEM, attached.new_cache())
        with pytest.raises(ValueError, match=r"ids: expected one row of tokens, got \(2, 3\)"):
            prompts.new_cache(tokens(2, 3))


def test_state_that_is_not_in_pages_is_refused():
    config = tf.Qwen3NextConfig(
        **COMMON, head_dim=32, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.warns(PartlyPaged, match="1 of 3 layers read pages; 2 with a state of their own"):
        attached = quantpage.attach(model)
    with (
        attached,
        pytest.raises(UnsupportedModel, match="layer 0: expected keys and values in pages"),
    ):
        attached.prompts()


def test_a_state_beside_pages_is_refused(tmp_path):
    config = tf.FalconH1Config(
        **COMMON, head_dim=16, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        mamba_d_ssm=128,
    )  # fmt: skip
    model, ids = tf.AutoModelForCausalLM.from_config(config).eval(), tokens(1, 30)
    with pytest.warns(PartlyPaged), quantpage.attach(model, page_size=PAGE) as attached:
        cache = model(ids, use_cache=True).past_key_values
        for act in (
            attached.prompts,
            lambda: attached.save_cache(cache, tmp_path / "pages"),
            lambda: attached.load_cache(tmp_path / "pages"),
        ):
            with pytest.raises(UnsupportedModel, match="layer 0: expected keys and values in page"):
                act()
        with pytest.raises(CacheError, match=r"layer 0: .* to drop 3 tokens, got PagedHybridLayer"):
            cache.crop(27)
        # As it was, and nothing to forget is no refusal.
        cache.crop(30)
        with torch.inference_mode():
            got = model(ids[:, :5], past_key_values=cache).logits
            wanted = model(torch.cat([ids, ids[:, :5]], 1)).logits[:, 30:]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_a_state_in_modules_is_refused(tmp_path):
    config = tf.RecurrentGemmaConfig(**{**COMMON, "num_key_value_heads": 1})
    model, ids = tf.AutoModelForCausalLM.from_config(config).eval(), tokens(1, 30)
    with pytest.warns(PartlyPaged), quantpage.attach(model, page_size=PAGE) as attached:
        prompts = attached.prompts()
        cache = prompts.new_cache(ids)
        model(ids, past_key_values=cache)
        for act in (
            lambda: prompts.remember(ids, cache),
            lambda: attached.save_cache(cache, tmp_path / "pages"),
        ):
            with pytest.raises(UnsupportedModel, match="layer 0: expected keys and values in page"):
                act()
        with pytest.raises(CacheError, match=r"layer 0: .* in the cache, .* its modules keep it"):
            cache.fork()
        with pytest.raises(CacheError, match="layer 0: expected a state that remembers its past"):
            cache.crop(-2)
        assert cache.get_seq_length() == 30


def test_a_cache_for_one_row_refuses_more_until_it_is_repeated(model):
    with quantpage.attach(model, "int4", page_size=PAGE) as attached:
        prompts = attached.prompts()
        prompts.learn(SYSTEM)
        cache = prompts.new_cache(SYSTEM)
        more = tokens(3, 8)
        with pytest.raises(ValueError, match="past_key_values: expected 1 rows"):
            model(more, past_key_values=cache)
        cache = prompts.new_cache(SYSTEM)
        cache.batch_repeat_interleave(3)
        got = model(more, past_key_values=cache).logits
        wanted = model(torch.cat([SYSTEM[:, : 5 * PAGE].expand(3, -1), more], 1)).logits[:, -8:]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_a_summary_is_no_part_of_a_format():
    assert replace(FORMATS["int8"], summary="other words") == FORMATS["int8"]


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="needs models/smollm2")
@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_real_model_says_the_same_after_a_learnt_prompt(kv_format):
    # In float32 products of another shape round differently, and a tie of the quantizer may fall
    # the other way; in float64 nothing differs.
    model, tokenizer = load_model(MODEL, torch.float64)
    instruction = "You are a careful librarian who answers briefly. " * 20
    system = tokenizer(instruction)["input_ids"]
    ids = torch.tensor([tokenizer(instruction + "Q: Who wrote")["input_ids"]])
    with quantpage.attach(model, kv_format) as attached:
        prompts = attached.prompts()
        prompts.learn(torch.tensor([system]))
        cache = prompts.new_cache(ids)
        assert cache.get_seq_length() == len(system) // 64 * 64 >= 128
        got, wanted = (
            model.generate(
                ids, past_key_values=each, max_new_tokens=3, do_sample=False,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            )
            for each in (cache, attached.new_cache())
        )  # fmt: skip
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(wanted.logits), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("name", ["is_causal", "use_bidirectional_attention"])
def test_a_decoder_that_sees_what_follows_keeps_no_beginnings_and_cuts_no_prompts(name):
    model = tiny("llama")
    setattr(model.config, name, name != "is_causal")
    with quantpage.attach(model, "int8", page_size=PAGE) as attached:
        with pytest.raises(UnsupportedModel, match=f"see none behind them.*got {name}="):
            attached.prompts()
        with pytest.raises(UnsupportedModel, match=f"see none behind them.*got {name}="):
            Engine(attached, None, Limits(pages=8))
