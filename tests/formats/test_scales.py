"""Static scales: what does not fit is refused, by layer, half, expectation and fact."""

import pytest
import torch

from quantpage.errors import FormatError
from quantpage.formats import FORMATS
from quantpage.formats.scales import LayerScales, StaticScales

pytestmark = pytest.mark.pure
HEADS, WIDTH = 4, 32


def scales(name="int8_static", layers=(0, 1), **other):
    form = FORMATS[name]
    shapes = [s.granularity.scale_shape(HEADS, WIDTH) for s in (form.key, form.value)]
    made = {
        "key_scale": torch.rand(shapes[0]) + 0.5,
        "value_scale": torch.rand(shapes[1]) + 0.5,
        "key_zero": torch.randn(shapes[0]) if form.key.zero_point else None,
        "value_zero": torch.randn(shapes[1]) if form.value.zero_point else None,
        **other,
    }
    return StaticScales(form, HEADS, WIDTH, {index: LayerScales(**made) for index in layers})


@pytest.mark.parametrize("name", ["int8_static", "fp8_static", "int4_static"])
def test_what_fits_is_taken(name):
    given = scales(name)
    assert given.find(1) is given.layers[1]
    moved = given.to("cpu")
    assert moved.find(0).key_scale.dtype == FORMATS[name].key.scale_dtype


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "int8_static",
            {"key_scale": torch.ones(HEADS, 1)},
            r"layer 0, key scale: expected \(4, 32\) for int8_static \(one a channel\), got \(4, 1",
        ),
        (
            "fp8_static",
            {"value_scale": torch.ones(HEADS)},
            r"layer 0, value scale: expected \(4, 1\) for fp8_static \(one a kv_head\), got \(4,\)",
        ),
        ("int8_static", {"value_scale": None}, r"value scale: expected \(4, 32\).*got None"),
        ("int4_static", {"key_zero": None}, r"key zero: expected \(4, 32\).*got None"),
        ("fp8_static", {"key_zero": torch.ones(HEADS, 1)}, "key zero: expected None.*a tensor"),
        (
            "fp8_static",
            {"key_scale": torch.tensor([[1.0], [1.0], [0.0], [1.0]])},
            r"key scale\[2, 0\]: expected positive finite numbers, got 0.0",
        ),
        (
            "fp8_static",
            {"key_scale": torch.tensor([[1.0], [torch.nan], [1.0], [1.0]])},
            r"key scale\[1, 0\]: expected positive finite numbers, got nan",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, other, message):
    with pytest.raises(FormatError, match=message):
        scales(name, **other)


def test_a_missing_layer_is_refused():
    with pytest.raises(FormatError, match=r"layer 7: expected static scales.*got them for 0 .. 1"):
        scales().find(7)


def test_a_dynamic_format_takes_none():
    with pytest.raises(FormatError, match="format: expected a static one, got int8"):
        StaticScales(FORMATS["int8"], HEADS, WIDTH, {})


def test_a_shard_has_its_own_heads():
    whole = scales()
    part = whole.heads(1, 3)
    assert part.kv_heads == 2
    assert torch.equal(part.find(0).key_scale, whole.find(0).key_scale[1:3])
    with pytest.raises(ValueError, match=r"first, last: expected a range within 0..4"):
        whole.heads(3, 5)


def test_the_digest_knows_every_number():
    whole = scales()
    assert whole.digest() == StaticScales(whole.format, HEADS, WIDTH, whole.layers).digest()
    altered = whole.layers[1].value_scale.clone()
    altered[3, 31] += 1e-3
    other = {**whole.layers, 1: LayerScales(whole.layers[1].key_scale, altered)}
    assert StaticScales(whole.format, HEADS, WIDTH, other).digest() != whole.digest()
