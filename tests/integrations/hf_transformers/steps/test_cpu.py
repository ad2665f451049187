"""A step on a CPU: the compiled core in place of a model's own layers."""

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import quantpage
from quantpage.cpu_core import find_core
from quantpage.cpu_core.decoder import Decoder
from quantpage.integrations.hf_transformers.modules.arguments import cache_as
from quantpage.integrations.int8_weights import Int8Linear, quantize_weights
from tests.integrations.tiny_models import BUILDERS, COMMON, tiny, tokens

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(find_core() is None, reason="no compiled core in this installation"),
]

CHAINED = ("llama", "multi_query", "mistral_window", "qwen2_bias")
"""Models whose blocks run in one call."""
PROMPT, LENGTH = 40, 56
STEPS = 9
"""A prompt, and the tokens after it two at a time."""


@pytest.fixture
def calls(monkeypatch):
    """Counts the steps in which all blocks ran in one call."""
    made, run = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *a: made.append(1) or run(*a))
    return made


@torch.inference_mode()
def decode(model, ids, chunk=2, **first):
    """Logits after the prompt, a few tokens at a time; ``first``: of the prompt."""
    out = model(ids[:, :PROMPT], use_cache=True, **first)
    cache, logits = out.past_key_values, []
    mask = first.get("attention_mask")
    for at in range(PROMPT, ids.shape[1], chunk):
        given = {} if mask is None else {"attention_mask": torch.ones_like(ids[:, : at + chunk])}
        if mask is not None:
            given["attention_mask"][:, :PROMPT] = mask
        logits.append(model(ids[:, at : at + chunk], **cache_as(model, cache), **given).logits)
    return torch.cat(logits, 1)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", [each for each in BUILDERS if each != "gpt_oss_sinks"])
def test_float32_logits_are_those_of_float64(name, calls):
    ids = tokens(2, LENGTH)
    want = decode(tiny(name), ids)
    model = tiny(name, torch.float32)
    own = relative(decode(model, ids), want)
    with quantpage.attach(model, kv_format="none", page_size=16):
        got = relative(decode(model, ids), want)
    assert got < max(1.5 * own, 3e-6)
    assert len(calls) == (STEPS if name in CHAINED else 0)


@pytest.mark.parametrize("name", CHAINED)
def test_bf16_logits_are_as_good_as_transformers_own(name):
    ids, model = tokens(2, LENGTH), tiny(name, torch.bfloat16)
    want = decode(tiny(name, torch.bfloat16).double(), ids)
    own = relative(decode(model, ids), want)
    with quantpage.attach(model, kv_format="none", page_size=16):
        assert relative(decode(model, ids), want) < own


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8", "int4,first1=none"])
def test_pages_hold_what_the_models_own_layers_write(kv_format, calls):
    ids, model = tokens(2, LENGTH), tiny("llama", torch.float32)
    with quantpage.attach(model, kv_format=kv_format, page_size=16):
        got = decode(model, ids)
    assert len(calls) == STEPS
    with quantpage.attach(model, kv_format=kv_format, page_size=16, implementation="torch"):
        want = decode(model, ids)
    assert len(calls) == STEPS
    # Codes differ on ties alone, queries by the 15 bits that the core rounds them to.
    assert (got - want).abs().median() < 2e-3 * want.abs().median()


def test_a_padded_row_is_the_same_row_alone(calls):
    ids, model = tokens(2, LENGTH), tiny("llama", torch.float32)
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with quantpage.attach(model, kv_format="none", page_size=16):
        prompt = {"attention_mask": mask, "position_ids": positions}
        both = _decode_padded(model, ids, prompt)
        alone = _decode_padded(model, ids[1:, 9:], {}, PROMPT - 9)
    # The prompt without padding, too.
    assert len(calls) == 2 * 16 + 1
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def _decode_padded(model, ids, prompt, length=PROMPT):
    out = model(ids[:, :length], use_cache=True, **prompt)
    logits, cache = [], out.past_key_values
    mask, positions = prompt.get("attention_mask"), prompt.get("position_ids")
    for at in range(length, ids.shape[1]):
        given = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            positions = positions[:, -1:] + 1
            given = {"attention_mask": mask, "position_ids": positions}
        logits.append(model(ids[:, at : at + 1], **cache_as(model, cache), **given).logits)
    return torch.cat(logits, 1)


def test_int8_weights_are_multiplied_as_the_numbers_they_stand_for(calls):
    ids, model = tokens(2, LENGTH), tiny("qwen2_bias", torch.float32)
    coded = quantize_weights(tiny("qwen2_bias", torch.float32))
    with torch.no_grad():
        for module, other in zip(model.modules(), coded.modules(), strict=True):
            if isinstance(other, Int8Linear):
                module.weight.copy_(other.weight.float() * other.scale.float()[:, None])
    with quantpage.attach(model, kv_format="none", page_size=16) as attached:
        cache = attached.new_cache()
        with torch.inference_mode():
            model(ids[:, :PROMPT], past_key_values=cache)
            copied = cache.fork()
            want = model(ids[:, PROMPT : PROMPT + 2], past_key_values=cache).logits
    quantize_weights(model)
    with quantpage.attach(model, kv_format="none", page_size=16), torch.inference_mode():
        got = model(ids[:, PROMPT : PROMPT + 2], past_key_values=copied).logits
    assert len(calls) == 3
    # Of activations in 16 bits (AVX-512); torch's own product takes bfloat16, which is coarser.
    assert relative(got, want.double()) < 2e-4


def test_detaching_leaves_nothing_behind():
    model = tiny("llama", torch.float32)
    attached = quantpage.attach(model)
    assert any("forward" in vars(each) for each in model.modules())
    attached.detach()
    assert not any("forward" in vars(each) for each in model.modules())
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_a_forward_of_somebody_else_is_kept():
    model = tiny("llama", torch.float32)
    linear, seen = model.model.layers[1].mlp.up_proj, []
    linear.forward = lambda x: seen.append(1) or type(linear).forward(linear, x)
    with quantpage.attach(model):
        decode(model, tokens(1, PROMPT + 2))
    assert len(seen) == 2 and "forward" in vars(linear)


def test_hooks_inside_are_called(calls):
    model, seen = tiny("llama", torch.float32), []
    with quantpage.attach(model):
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        decode(model, tokens(1, LENGTH))
    assert len(seen) == 1 + 8 and not calls


def test_hidden_states_are_those_of_every_layer():
    ids, model = tokens(1, PROMPT + 1), tiny("llama", torch.float32)
    want = model(ids, output_hidden_states=True).hidden_states
    with quantpage.attach(model, kv_format="none") as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(ids[:, :PROMPT], past_key_values=cache)
        got = model(ids[:, PROMPT:], past_key_values=cache, output_hidden_states=True).hidden_states
    assert len(got) == len(want)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine[:, -1], its[:, -1], atol=1e-4, rtol=1e-4)


CALLS = {
    "positional": lambda model, ids, cache: model.model(ids, **cache_as(model, cache)),
    "embedded": lambda model, ids, cache: model.model(
        inputs_embeds=model.model.embed_tokens(ids), **cache_as(model, cache)
    ),
    "positions": lambda model, ids, cache: model.model(
        ids, position_ids=torch.arange(PROMPT, PROMPT + 2)[None] + 7, **cache_as(model, cache)
    ),
    "masked": lambda model, ids, cache: model.model(
        ids, attention_mask=torch.ones(2, PROMPT + 2).long(), **cache_as(model, cache)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_decoder_that_is_called_in_other_ways(name, calls):
    ids, model = tokens(2, PROMPT + 2), tiny("llama", torch.float32)
    got, want = (
        _after_a_prompt(model, ids, CALLS[name], implementation)
        for implementation in (None, "torch")
    )
    assert len(calls) == 2
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert got.past_key_values.get_seq_length() == PROMPT + 2


def test_what_the_call_of_all_blocks_does_not_answer(calls):
    ids, model = tokens(2, PROMPT + 2), tiny("llama", torch.float32)

    def run(**others):
        return lambda model, ids, cache: model.model(ids, **cache_as(model, cache), **others)

    made = _after_a_prompt(model, ids, run(return_dict=False), None)
    assert isinstance(made, tuple) and made[0].shape == (2, 2, 64)
    # The prompt before it alone.
    assert calls == [1]
    with pytest.raises(ValueError, match="exactly one"):
        _after_a_prompt(model, ids, run(inputs_embeds=torch.zeros(2, 2, 64)), None)
    model.config.output_hidden_states = True
    assert len(_after_a_prompt(model, ids, run(), None).hidden_states) == 4
    # Of the refused call the prompt.
    assert calls == [1, 1]


@torch.inference_mode()
def _after_a_prompt(model, ids, call, implementation):
    options = {"kv_format": "none", "page_size": 16, "implementation": implementation}
    with quantpage.attach(model, **options) as attached:
        cache = attached.new_cache()
        model(ids[:, :PROMPT], **cache_as(model, cache))
        return call(model, ids[:, PROMPT:], cache)


ROTARY = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_angles_of_every_kind_of_rotary_embedding(kind, calls):
    rotary = {"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]}
    sizes = {**COMMON, "max_position_embeddings": 48}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, rope_parameters=rotary, attn_implementation="eager")
    ).eval()
    ids = tokens(1, LENGTH)
    # Transformers 5.12 never sets dynamic frequencies back: a model answers only once.
    want = decode(copy.deepcopy(model), ids)
    with quantpage.attach(model, kv_format="none", page_size=16):
        got = decode(model, ids)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    # Where frequencies change with the length, blocks that saw them change run by themselves.
    assert len(calls) == STEPS or kind == "dynamic"


@pytest.mark.parametrize(
    "what", ["data", "parameter", "module", "layers", "epsilon", "scaling", "forward", "window"]
)
def test_changes_after_attaching_are_noticed(what):
    name = "mistral_window" if what == "window" else "llama"
    ids, model = tokens(1, LENGTH), tiny(name, torch.float32)
    with quantpage.attach(model, kv_format="none", page_size=16):
        before = decode(model, ids)
        block = model.model.layers[2]
        projection = block.mlp.down_proj
        if what == "data":
            projection.weight.data = projection.weight * 2
        elif what == "parameter":
            projection.weight = torch.nn.Parameter(projection.weight * 2)
        elif what == "module":
            model.model.layers[2].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
        elif what == "epsilon":
            block.input_layernorm.variance_epsilon = 1.0
        elif what == "scaling":
            block.self_attn.scaling *= 2
        elif what == "forward":
            block.mlp.forward = lambda x: 2 * type(block.mlp).forward(block.mlp, x)
        elif what == "window":
            model.config.sliding_window = 9
        else:
            model.config.num_hidden_layers = 2
        got = decode(model, ids)
    want = decode(model, ids)
    assert relative(got, want.double()) < 1e-5 < relative(got, before.double())


def test_a_block_that_is_called_alone_is_one_block():
    model = tiny("llama", torch.float32)
    with quantpage.attach(model, kv_format="none") as attached, torch.inference_mode():
        cache = attached.new_cache()
        model(tokens(1, PROMPT), past_key_values=cache)
        x, at = torch.randn(1, 1, 64), torch.tensor([[PROMPT]])
        turn = model.model.rotary_emb(x, at)
        copy = cache.fork()
        got = model.model.layers[0](x, position_embeddings=turn, past_key_values=cache)
    options = {"kv_format": "none", "implementation": "torch"}
    with quantpage.attach(model, **options), torch.inference_mode():
        block = model.model.layers[0]
        want = block(x, position_embeddings=turn, **cache_as(block, copy))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_flow_as_without():
    model, ids = tiny("llama", torch.float32), tokens(1, 8)
    with quantpage.attach(model, kv_format="none"):
        model(ids).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
@torch.inference_mode()
def test_a_step_is_the_same_bits_for_any_number_of_threads(kv_format, calls):
    ids, model = tokens(2, LENGTH), tiny("llama", torch.bfloat16)
    before, made = torch.get_num_threads(), []
    with quantpage.attach(model, kv_format=kv_format, page_size=16) as attached:
        try:
            for threads in (1, 3, 9):
                torch.set_num_threads(threads)
                cache = attached.new_cache()
                steps = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
                made.append([model.model(each, **cache_as(model, cache))[0] for each in steps])
        finally:
            torch.set_num_threads(before)
    assert len(calls) == 3 * (1 + LENGTH - PROMPT)
    for others in made[1:]:
        assert all(map(torch.equal, others, made[0]))


@pytest.mark.parametrize("what", ["class", "function", "hook"])
def test_code_that_is_changed_for_every_model_is_noticed(what, monkeypatch):
    """As libraries of kernels do it (Liger), and tools that watch all modules."""
    ids, model = tokens(1, LENGTH), tiny("llama", torch.float32)
    mlp, file = type(model.model.layers[0].mlp), sys.modules[type(model).__module__]
    own, turn = mlp.forward, file.apply_rotary_pos_emb
    hooks = []
    try:
        with quantpage.attach(model, kv_format="none", page_size=16):
            before = decode(model, ids)
            if what == "class":
                monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * own(self, x))
            elif what == "function":
                monkeypatch.setattr(
                    file, "apply_rotary_pos_emb", lambda q, k, *turned: turn(2 * q, k, *turned)
                )
            else:
                hooks.append(
                    register_module_forward_hook(
                        lambda module, _, out: 2 * out if type(module) is mlp else None
                    )
                )
            got = decode(model, ids)
        want = decode(model, ids)
    finally:
        for each in hooks:
            each.remove()
    assert relative(got, want.double()) < 1e-5 < relative(got, before.double())


def test_who_counts_what_torch_does_sees_it():
    ids, model = tokens(1, LENGTH), tiny("llama", torch.float32)
    counted = []
    for attached in (False, True):
        around = quantpage.attach(model, kv_format="none") if attached else nullcontext()
        with around, FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(ids)
        counted.append(sum(counter.get_flop_counts()["Global"].values()))
    # What is counted of attention itself is the model's own alone.
    assert 0.8 * counted[0] < counted[1] <= counted[0]
