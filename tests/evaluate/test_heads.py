"""Errors of attention's output by layer and head, and what keys look like."""

import pytest
import torch
import torch.nn.functional as F

from quantpage.evaluate.heads import OUTLIER, head_errors, look_at_keys
from quantpage.formats import FORMATS
from quantpage.formats.quantize import dequantize, quantize
from quantpage.formats.rotate import rotate
from quantpage.integrations.hf_transformers.keys.watch import watched
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu


def seen(model, ids):
    """Every layer's query, key and value of an unquantized forward."""
    found = {}
    with watched(model, lambda i, q, k, v, attend: found.update({i: (q, k, v)})), torch.no_grad():
        model(ids)
    return found


def rounded(x, spec):
    """Through the codes and back, by the definitions of formats/."""
    turned = rotate(x) if spec.rotation == "hadamard" else x
    back = dequantize(*quantize(turned, spec), spec)
    return (rotate(back) if spec.rotation == "hadamard" else back).to(x.dtype)


def wanted(q, k, v, spec, half):
    """Errors of each kv_head, written down a second time."""

    def attend(k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    exact = attend(k, v)
    off = attend(rounded(k, spec), v) if half == "keys" else attend(k, rounded(v, spec))
    groups = [x.double().unflatten(1, (k.shape[1], -1)) for x in (off - exact, exact)]
    size, whole = (x.square().sum((0, 2, 3, 4)).sqrt() for x in groups)
    return (size / whole).tolist()


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "k8v4"])
def test_errors_are_those_of_the_codes_alone(name):
    model, ids = tiny("llama", torch.float32), tokens(1, 90)
    found = head_errors(model, ids, name, page_size=16)
    layers = seen(model, ids)
    assert list(found.keys) == list(found.values) == [0, 1, 2]
    for index, qkv in layers.items():
        for half in ("keys", "values"):
            spec = getattr(FORMATS[name], half[:-1])
            got = getattr(found, half)[index]
            # 16 bits of a scale may fall on either side, a code in a thousand with it.
            assert got == pytest.approx(wanted(*qkv, spec, half), rel=0.02)


def test_only_layers_with_codes_have_errors():
    model, ids = tiny("llama", torch.float32), tokens(1, 40)
    found = head_errors(model, ids, "none,layers=1:k=int4,v=none", page_size=16)
    assert list(found.keys) == [1] and found.values == {}
    none = head_errors(model, ids, "none")
    assert none.keys == {} == none.values


@pytest.mark.parametrize("name", ["gemma3_window", "gpt_oss_sinks", "qwen2_bias"])
def test_other_kinds_of_attention_have_errors_of_the_same_size(name):
    model, ids = tiny(name, torch.float32), tokens(1, 90)
    before = model(ids).logits
    found = head_errors(model, ids, "int8", page_size=16)
    for half in (found.keys, found.values):
        assert sorted(half) == [0, 1, 2]
        assert all(0 < each < 0.1 for row in half.values() for each in row)
    assert torch.equal(model(ids).logits, before)


def test_keys_are_shown_on_their_way_and_outliers_are_named():
    model, ids = tiny("llama", torch.float32), tokens(1, 60)
    with torch.no_grad():
        # Head 1's channel 5 and its partner under RoPE.
        weight = model.model.layers[1].self_attn.k_proj.weight
        weight[16 + 5] *= 30
        weight[16 + 13] *= 30
    plain = look_at_keys(model, ids, shown=10)
    assert [each.layer for each in plain] == [0, 1, 2]
    layer = plain[1]
    assert layer.plain.shape == layer.rotated.shape == layer.mapped.shape == (2, 10, 16)
    torch.testing.assert_close(rotate(layer.plain), layer.rotated)
    assert {channel for channel, _ in layer.outliers(1)} == {5, 13}
    assert all(times > OUTLIER for _, times in layer.outliers(1))
    assert {channel for channel, _ in layer.outliers(0)} <= {0, 1, 2}
    assert not layer.map_in_use
    # The map evens channels out, which is what it is for.
    spread = [x[1].square().mean(0).sqrt() for x in (layer.plain, rotate(layer.mapped))]
    assert spread[1].max() / spread[1].median() < spread[0].max() / spread[0].median() / 4


def test_a_map_that_attach_uses_is_the_one_that_is_shown():
    model, ids = tiny("qwen2_bias", torch.float32), tokens(1, 60)
    assert all(each.map_in_use for each in look_at_keys(model, ids))
    assert not any(each.map_in_use for each in look_at_keys(model, ids, calibration=None))
