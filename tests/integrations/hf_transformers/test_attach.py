"""attach(): real Transformers models over quantized pages, against their own attention."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, Lfm2Config, Lfm2ForCausalLM

import quantpage
from quantpage.errors import FormatError, NonFiniteInput, PartlyPaged, UnsupportedModel
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.attach import _refuse_devices
from quantpage.integrations.hf_transformers.modules.arguments import cache_as
from tests.integrations.oracle import oracle
from tests.integrations.tiny_models import BUILDERS, COMMON, tiny, tokens

pytestmark = pytest.mark.cpu

DYNAMIC = [name for name, each in FORMATS.items() if each.dynamic]
BIASED = {"qwen2_bias", "gpt_oss_sinks", "glm_partial_rotary"}
"""Models whose key projections add a bias."""
SINGLE = {"gpt_oss_sinks"}
"""Models whose experts have no float64 product."""


def build(name):
    return tiny(name, torch.float32 if name in SINGLE else torch.float64)


def closeness(name):
    """float64 models differ by rounding of a few hundred products; float32 ones by 2^-24 of it,
    amplified through three layers."""
    return 2e-3 if name in SINGLE else 1e-8


@torch.inference_mode()
def stepwise(model, ids, prompt, cache=None, chunk=1):
    """Logits of every position: the prompt in one piece, the rest in chunks through the cache."""
    out = model(ids[:, :prompt], **cache_as(model, cache), use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for start in range(prompt, ids.shape[1], chunk):
        out = model(ids[:, start : start + chunk], **cache_as(model, cache), use_cache=True)
        logits.append(out.logits)
        cache = out.past_key_values
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", BUILDERS)
def test_none_equals_transformers_own(name):
    model, ids = build(name), tokens(2, 76)
    wanted = stepwise(model, ids, 70)
    with quantpage.attach(model, kv_format="none", page_size=16):
        got = stepwise(model, ids, 70)
    # Transformers' eager softmax rounds to float32 whatever the model's dtype.
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)
    assert (got - wanted).abs().mean() < 5e-5


@pytest.mark.parametrize("kv_format", DYNAMIC)
@pytest.mark.parametrize("name", BUILDERS)
def test_logits_equal_the_oracle(name, kv_format):
    model, ids = build(name), tokens(2, 76)
    with quantpage.attach(model, kv_format=kv_format, page_size=16) as attached:
        got = stepwise(model, ids, 70)
    # Models whose keys have biases: without what all of them have in common.
    key_maps = attached.options.key_maps
    assert bool(key_maps) == (name in BIASED and FORMATS[kv_format].key.quantized)
    with oracle(model, FORMATS[kv_format], 16, key_maps):
        # Without a configuration: layers that forget what left the window would shift positions.
        wanted = stepwise(model, ids, 70, DynamicCache())
    if name in SINGLE:
        # Codes flip where float32 inputs differ by rounding; a flip moves a logit, not the mean.
        assert (got - wanted).abs().mean() < 0.05
    else:
        torch.testing.assert_close(got, wanted, atol=closeness(name), rtol=0)


@pytest.mark.parametrize("kv_format", DYNAMIC)
def test_logits_do_not_depend_on_the_cut(kv_format):
    model, ids = tiny("llama"), tokens(1, 100)
    with quantpage.attach(model, kv_format=kv_format, page_size=16):
        whole = stepwise(model, ids, 100)
        for chunk in (1, 7, 64):
            cut = stepwise(model, ids, 5, chunk=chunk)
            torch.testing.assert_close(cut, whole, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kv_format", DYNAMIC)
def test_a_left_padded_row_equals_the_row_alone(kv_format):
    model, ids = tiny("llama"), tokens(1, 60)
    pad = 23
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], 1)
    other = tokens(1, 60 + pad, seed=5)
    batch = torch.cat([padded, other])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    arguments = {"max_new_tokens": 12, "do_sample": False}
    with quantpage.attach(model, kv_format=kv_format, page_size=16):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        both = model.generate(batch, attention_mask=mask, **arguments)
    assert both[0, pad:].tolist()[: alone.shape[1]] == alone[0].tolist()


@pytest.mark.parametrize("tokens_to_remove", [2.5, torch.tensor(2.5), "2", None])
def test_crop_takes_whole_numbers(tokens_to_remove):
    with quantpage.attach(tiny("llama")) as attached:
        cache = attached.new_cache()
        attached.model(tokens(1, 9), **cache_as(attached.model, cache))
        with pytest.raises(ValueError, match="tokens_to_remove: expected a whole number, got"):
            cache.crop(tokens_to_remove)
        assert cache.get_seq_length() == 9
        cache.crop(torch.tensor(-2))
        assert cache.get_seq_length() == 7


@pytest.mark.parametrize("side", ["left", "right", "between"])
@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
def test_crop_of_a_padded_batch_forgets_columns_and_not_tokens(kv_format, side):
    model, ids, more = tiny("llama"), tokens(2, 60), tokens(2, 3, seed=9)
    mask, keep = torch.ones_like(ids), 50
    hidden = {"left": slice(17), "right": slice(45, None), "between": slice(20, 31)}[side]
    mask[0, hidden] = 0
    after = torch.cat([mask[:, :keep], torch.ones_like(more)], 1)
    positions = (after.cumsum(1) - 1)[:, keep:]
    with torch.inference_mode(), quantpage.attach(model, kv_format=kv_format, page_size=16):
        found = []
        for first in (ids, ids[:, :keep]):
            cache = model(first, attention_mask=mask[:, : first.shape[1]]).past_key_values
            cache.crop(keep)
            assert cache.get_seq_length() == keep
            out = model(
                more, attention_mask=after, position_ids=positions, **cache_as(model, cache)
            )
            found.append(out.logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=["beams", "sampling", "several"],
)
def test_generate_equals_the_dense_control(kv_format, arguments):
    model, ids = tiny("llama"), tokens(2, 40)
    arguments = {"max_new_tokens": 30, "attention_mask": torch.ones_like(ids), **arguments}
    with oracle(model, FORMATS[kv_format], 16):
        torch.manual_seed(3)
        wanted = model.generate(ids, **arguments)
    with quantpage.attach(model, kv_format=kv_format, page_size=16):
        torch.manual_seed(3)
        got = model.generate(ids, **arguments)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("draft", [6, 48])
@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
def test_prompt_lookup_equals_greedy(kv_format, draft):
    model = tiny("llama")
    ids = tokens(1, 12).repeat(1, 5)
    arguments = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with quantpage.attach(model, kv_format=kv_format, page_size=16):
        greedy = model.generate(ids, **arguments)
        looked_up = model.generate(ids, prompt_lookup_num_tokens=draft, **arguments)
    assert looked_up.tolist() == greedy.tolist()


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_cache_continues_over_two_calls(kv_format):
    model, ids = tiny("llama"), tokens(1, 50)
    with quantpage.attach(model, kv_format=kv_format, page_size=16) as attached:
        cache = attached.new_cache()
        first = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
        )
        longer = torch.cat([first, tokens(1, 9, seed=9)], 1)
        ones = torch.ones_like(longer)
        warm = model.generate(
            longer, attention_mask=ones, past_key_values=cache, max_new_tokens=8, do_sample=False
        )
        cold = model.generate(longer, attention_mask=ones, max_new_tokens=8, do_sample=False)
    assert warm.tolist() == cold.tolist()


def test_formats_differ_by_layer():
    model, ids = tiny("llama"), tokens(1, 80)
    with quantpage.attach(model, kv_format="int4,first1=none,last1=int8") as attached:
        out = model(ids, use_cache=True)
    names = [layer.layout.format.name for layer in out.past_key_values.layers]
    assert names == ["none", "int4", "int8"]
    assert "int4" in attached.formats.name


def test_detaching_restores_the_model_exactly():
    model, ids = tiny("llama"), tokens(1, 30)
    before = model(ids).logits
    keys, hooks = set(vars(model)), len(model._forward_pre_hooks)
    with quantpage.attach(model, kv_format="int4"):
        assert model.config._attn_implementation == "quantpage"
        model(ids)
    assert model.config._attn_implementation == "eager"
    assert set(vars(model)) == keys and len(model._forward_pre_hooks) == hooks
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_what_is_attached_is_not_copied(way):
    model = tiny("llama")
    with quantpage.attach(model) as attached:
        for each in (model, model.model, {"in": model}):
            with pytest.raises(ValueError, match="expected a model that is not attached to copy"):
                way(each)
        cache = attached.new_cache()
        model(tokens(1, 5), **cache_as(model, cache))
        with pytest.raises(ValueError, match=r"expected save_cache\(\) or fork\(\)"):
            (copy.copy if way is copy.deepcopy else way)(cache)
        assert copy.deepcopy(cache).get_seq_length() == 5
    way(model)


def test_an_attachment_that_was_left_is_not_entered_again():
    with quantpage.attach(tiny("llama")) as attached, attached:
        assert attached.model.config._attn_implementation == "quantpage"
    with pytest.raises(ValueError, match="expected an attachment that stands, got one that was"):
        attached.__enter__()


def test_a_failed_attach_changes_nothing():
    model = tiny("llama")
    for arguments, error in (
        ({"kv_format": "int33"}, FormatError),
        ({"page_size": 0}, ValueError),
        ({"page_size": 64.0}, ValueError),
        ({"backend": "fastest"}, ValueError),
        ({"implementation": "fastest"}, ValueError),
        ({"mask": torch.ones(3, 3)}, ValueError),
        ({"calibration": 5}, ValueError),
        ({"max_tokens": 2.5}, ValueError),
    ):
        with pytest.raises(error, match=f"^{next(iter(arguments))}: expected"):
            quantpage.attach(model, **arguments)
        assert model.config._attn_implementation == "eager"
        assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "convolutions"])
@torch.inference_mode()
def test_rows_are_chosen_and_repeated_with_all_that_they_hold(kind):
    if kind == "llama":
        model = tiny("llama", torch.float32)
    else:
        own = Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"])
        model = Lfm2ForCausalLM(own).eval()
    ids, more = tokens(3, 40), tokens(6, 4)

    def goes_on(cache, rows):
        # One by one: convolutions of Transformers 5.12 begin anew with every longer step.
        got = [model(more[: len(rows), [at]], past_key_values=cache).logits for at in range(4)]
        want = model(torch.cat([ids[rows], more[: len(rows)]], 1)).logits[:, -4:]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)

    changes = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        "mask": (
            lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
            [0, 2],
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartlyPaged)
        attached = quantpage.attach(model, kv_format="none", page_size=16)
    with attached:
        for change, rows in changes.values():
            cache = attached.new_cache()
            model(ids, past_key_values=cache)
            change(cache)
            goes_on(cache, rows)
        for wrong in (
            lambda cache: cache.reorder_cache(torch.tensor([0, 1, 3])),
            lambda cache: cache.reorder_cache(torch.tensor([-1])),
            lambda cache: cache.batch_repeat_interleave(0),
        ):
            cache = attached.new_cache()
            model(ids, past_key_values=cache)
            with pytest.raises(ValueError, match=r"expected"):
                wrong(cache)
            goes_on(cache, [0, 1, 2])


def test_what_cannot_be_attached_says_why():
    with pytest.raises(UnsupportedModel, match="expected a Transformers model, got Linear"):
        quantpage.attach(torch.nn.Linear(2, 2))
    model = tiny("llama")
    # As peft's own, which hold adapters and the model that they are of.
    adapted = type("PeftModel", (torch.nn.Module,), {"get_base_model": lambda self: model})()
    with pytest.raises(UnsupportedModel, match=r"got PeftModel; attach its get_base_model\(\)"):
        quantpage.attach(adapted)
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        quantpage.attach(model)


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@pytest.mark.parametrize("own_attention", [False, True])
def test_a_model_is_attached_once(own_attention):
    model = tiny("llama")
    if own_attention:
        model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4))
    other = type(model)(model.config).eval()
    with quantpage.attach(model, kv_format="int8"):
        for each in (model, model.base_model):
            with pytest.raises(ValueError, match="expected a model that is not attached yet"):
                quantpage.attach(each, kv_format="int8")
        copied = type(model)(copy.deepcopy(model.config)).eval()
        if not own_attention:
            with pytest.raises(ValueError, match="expected a configuration of its own"):
                quantpage.attach(other)
    wanted = copied(tokens(1, 9)).logits
    with quantpage.attach(copied, kv_format="none", calibration=None):
        torch.testing.assert_close(copied(tokens(1, 9)).logits, wanted)
    assert copied.config._attn_implementation != "quantpage" or own_attention
    quantpage.attach(other).detach()


def test_a_foreign_cache_is_refused():
    model, ids = tiny("llama"), tokens(1, 30)
    used = model(ids, use_cache=True).past_key_values
    assert isinstance(used, DynamicCache)
    with quantpage.attach(model), pytest.raises(ValueError, match="past_key_values"):
        model(ids, past_key_values=used)


def test_checked_mode_names_layer_tensor_and_token():
    model, ids = tiny("llama"), tokens(1, 30)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with (
        quantpage.attach(model, checked=True),
        pytest.raises(NonFiniteInput, match="layer 1, value, token 0"),
    ):
        model(ids)


def test_a_foreign_mask_is_served_densely():
    model, ids = tiny("llama"), tokens(1, 40)
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    seen[:, 5:9] = torch.eye(40, dtype=torch.bool)[:, 5:9]
    mask = seen[None, None]
    wanted = model(ids, attention_mask=torch.zeros(1, 1, 40, 40).double().masked_fill(~mask, -1e30))
    with (
        quantpage.attach(model, kv_format="none") as attached,
        pytest.warns(PartlyPaged, match="densely .* because its mask is more than"),
    ):
        got = model(ids, attention_mask=mask)
    assert attached.coverage.paged == 0
    torch.testing.assert_close(got.logits, wanted.logits, atol=2e-3, rtol=0)


def test_without_a_cache_attention_is_transformers_own():
    model, ids = tiny("mistral_window"), tokens(2, 60)
    wanted = model(ids, use_cache=False).logits
    with quantpage.attach(model, kv_format="int4"):
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kv_format,step", [("none", 0.0), ("int8", 0.02), ("int4", 0.2)])
def test_dense_reading_is_in_the_basis_of_the_model(kv_format, step):
    """Rotated caches are turned back: what comes out is what went in, to the format's step."""
    model = tiny("llama").float()
    with quantpage.attach(model, kv_format) as attached:
        layer = attached.new_cache().layers[0]
        heads = model.config.num_key_value_heads
        shape = (2, heads, 40, model.config.hidden_size // model.config.num_attention_heads)
        given = [torch.randn(shape), torch.randn(shape)]
        layer.update(*given)
        for half, which in zip(given, ("key", "value"), strict=True):
            off = (layer.dequantized(which) - half).norm() / half.norm()
            assert off <= step


@pytest.mark.parametrize("kv_format", ["int8", "fp8", "int4"])
def test_foreign_attention_reads_through_dispatch(kv_format):
    model, ids = tiny("llama").float(), tokens(2, 70)
    with quantpage.attach(model, kv_format) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
    halves = [(layer, which) for layer in cache.layers for which in ("key", "value")]
    got = [layer.dequantized(which) for layer, which in halves]
    cache.options = replace(cache.options, implementation="torch")
    wanted = [layer.dequantized(which) for layer, which in halves]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_changes_nothing():
    """generate(stop_strings=...) needs one, and hands it on to every forward."""
    model = tiny("llama", torch.float32)
    with quantpage.attach(model, kv_format="int8") as attached:
        out = model.generate(
            tokens(2, 20),
            tokenizer=object(),
            max_new_tokens=4,
            do_sample=False,
        )
    assert out.shape[1] == 24 and attached.coverage.paged == 3


def test_a_model_on_other_gpus_than_kernels_run_on_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpus = [torch.device("cuda", each) for each in range(3)]
    # Weights that wait elsewhere until their layer runs say nothing.
    beside = [torch.device("cpu"), torch.device("meta")]
    for taken in ([], beside, [gpus[1]], [gpus[1], *beside]):
        _refuse_devices(taken)
    with pytest.raises(UnsupportedModel, match="expected weights on one GPU, got cuda:0, cuda:2;"):
        _refuse_devices([gpus[2], gpus[0], *beside])
    with pytest.raises(ValueError, match=r"current GPU, cuda:1, got cuda:2; torch.cuda.set_device"):
        _refuse_devices([gpus[2]])
