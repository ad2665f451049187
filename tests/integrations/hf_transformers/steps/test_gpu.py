"""Norms and rotary embeddings of an attached model in launches of ours: the model's own answers."""

import copy
import functools
import inspect

import pytest
import torch
import transformers as tf
from transformers.models.llama import modeling_llama as llama

import quantpage
from quantpage.integrations.hf_transformers.steps import gpu
from tests.integrations.tiny_models import BUILDERS, tiny, tokens
from tests.ops.triton_cases import DEVICE, TIER

pytestmark = TIER

OURS = {
    # Model -> (its norms, its attentions) that are Llama's word for word, in three layers.
    "llama": (7, 3),
    "mistral_window": (7, 3),
    "qwen2_bias": (7, 3),
    "qwen3_norm": (13, 3),
    "gemma2_softcap_window": (0, 3),
    "gemma3_window": (0, 3),
    "gpt_oss_sinks": (0, 0),
    "phi3_partial_rotary": (7, 0),
    "glm_partial_rotary": (7, 0),
}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """The interpreter's tensors stand for a device's."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "_on_gpu", lambda tensor: tensor.is_cpu)


def _installed(model):
    undo = []
    gpu.install(model, undo)
    return undo


def _replaced(model):
    return [each for each in model.modules() if "forward" in vars(each)]


@pytest.mark.parametrize("name", list(OURS))
def test_what_is_llamas_word_for_word_is_replaced_and_put_back(name):
    model = tiny(name).to(DEVICE)
    undo = _installed(model)
    ours = _replaced(model)
    norms = [each for each in ours if "Norm" in type(each).__name__]
    assert (len(norms), len(ours) - len(norms)) == OURS[name]
    for each in undo:
        each()
    assert not _replaced(model)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_logits_are_those_of_the_model_alone(name):
    """In float16: Triton's interpreter rounds no bfloat16."""
    model, ids = tiny(name, torch.float16).to(DEVICE), tokens(2, 9).to(DEVICE)
    with torch.inference_mode():
        wanted = model(ids).logits
        _installed(model)
        got = model(ids).logits
    # A norm may round one number in a hundred the other way.
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_rotation_alone_changes_no_bit():
    model, ids = tiny("llama", torch.float16).to(DEVICE), tokens(2, 9).to(DEVICE)
    with torch.inference_mode():
        wanted = model(ids).logits
        _installed(model)
        for each in _replaced(model):
            if "Norm" in type(each).__name__:
                del each.forward
        assert torch.equal(model(ids).logits, wanted)


def test_our_launches_are_what_runs(monkeypatch):
    """Else the two tests before this would prove nothing."""
    from quantpage.ops.triton import norm, rotary

    calls = []
    for file, name in ((norm, "rms_norm"), (rotary, "turn_heads")):
        own = getattr(file, name)
        monkeypatch.setattr(
            file, name, lambda *given, own=own, name=name: calls.append(name) or own(*given)
        )
    model, ids = tiny("llama", torch.float16).to(DEVICE), tokens(1, 3).to(DEVICE)
    _installed(model)
    with torch.inference_mode():
        model(ids)
    assert (calls.count("rms_norm"), calls.count("turn_heads")) == (7, 3)
    calls.clear()
    # Gradients go through the model's own code, and so do numbers that round otherwise.
    model(ids).logits.float().sum().backward()
    assert not calls and model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()
    with torch.inference_mode():
        model.float()(ids)
    assert set(calls) == {"rms_norm"}


def test_a_forward_of_somebody_else_stays():
    model = tiny("llama").to(DEVICE)
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    attention.forward, norm.forward = theirs = attention.forward, norm.forward
    undo = _installed(model)
    assert (vars(attention)["forward"], vars(norm)["forward"]) == theirs
    for each in undo:
        each()
    assert (vars(attention)["forward"], vars(norm)["forward"]) == theirs


def test_a_copy_of_the_model_reads_its_own_weights():
    model, ids = tiny("llama", torch.float16).to(DEVICE), tokens(1, 5).to(DEVICE)
    with torch.inference_mode():
        wanted = model(ids).logits
    _installed(model)
    other = copy.deepcopy(model)
    with torch.inference_mode():
        other.model.norm.weight.zero_()
        assert not other(ids).logits.any()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0.02, atol=0.1)
    attention = other.model.layers[0].self_attn
    assert vars(attention)["forward"].__self__ is attention


def test_a_rotation_that_is_not_llamas_stays(monkeypatch):
    def turn(q, k, cos, sin):
        return q, k

    monkeypatch.setattr(tf.models.mistral.modeling_mistral, "apply_rotary_pos_emb", turn)
    for name, expected in (("mistral_window", 0), ("llama", 3)):
        model = tiny(name).to(DEVICE)
        _installed(model)
        assert sum(isinstance(each, llama.LlamaAttention) or "Attention" in type(each).__name__
                   for each in _replaced(model)) == expected  # fmt: skip


def _holding(own):
    @functools.wraps(own)
    def forward(self, *args, old=None, **kwargs):
        return own(self, *args, **kwargs)

    return forward


def _looking_up(own):
    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        return type(self).mro()[1].forward(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize("wrap", [_holding, _looking_up])
def test_a_wrapper_of_the_forward_stays_around_it(wrap):
    model, ids = tiny("llama", torch.float16).to(DEVICE), tokens(1, 4).to(DEVICE)
    with torch.inference_mode():
        wanted = model(ids).logits
    attention = model.model.layers[0].self_attn
    kind = type(attention)
    attention.__class__ = type("Wrapped", (kind,), {"forward": wrap(kind.forward)})
    _installed(model)
    ours = vars(attention).get("forward")
    assert (ours is not None) == (wrap is _holding)
    if ours is not None:
        # The wrapper's own argument is there, and what it wraps calls our rotation.
        assert ours.__kwdefaults__ == {"old": None}
        names = inspect.unwrap(ours.__func__).__globals__
        assert names["apply_rotary_pos_emb"].__module__ == gpu.__name__
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0.02, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attached_on_a_device_the_answers_are_the_models(dtype):
    model, ids = tiny("qwen3_norm", dtype).cuda(), tokens(2, 60).cuda()
    with torch.inference_mode():
        wanted = model(ids).logits.float()
        with quantpage.attach(model, "none"):
            assert len(_replaced(model)) >= 16
            got = model(ids).logits.float()
        assert not _replaced(model)
        assert torch.equal(model(ids).logits.float(), wanted)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
