"""Static scales: what does not fit is refused, by layer, half, expectation and fact."""

from dataclasses import replace

import pytest
import torch

from quantpage.errors import FormatError
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec
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


PLANES = ("key_scale", "value_scale", "key_zero", "value_zero")


@pytest.mark.parametrize("name", ["int8_static", "fp8_static", "int4_static"])
def test_a_shard_has_its_own_heads(name):
    whole = scales(name)
    part = whole.heads(1, 3)
    assert part.kv_heads == 2 and part.head_dim == WIDTH and set(part.layers) == {0, 1}
    for index in (0, 1):
        for plane in PLANES:
            full, cut = getattr(whole.find(index), plane), getattr(part.find(index), plane)
            assert (full is None) == (cut is None)
            assert full is None or torch.equal(cut, full[1:3])
    with pytest.raises(ValueError, match=r"first, last: expected a range within 0..4"):
        whole.heads(3, 5)
    with pytest.raises(ValueError, match=r"first, last: expected a range within 0..4, got 2..2"):
        whole.heads(2, 2)


def test_one_scale_a_tensor_serves_every_shard():
    spec = QuantSpec(CODES["int8"], Granularity(per_head=False), dynamic=False)
    form = KVFormat("tensor", spec, spec)
    one = torch.full((1, 1), 0.5)
    whole = StaticScales(form, HEADS, WIDTH, {0: LayerScales(one, one * 2)})
    part = whole.heads(2, 3)
    assert part.kv_heads == 1
    assert torch.equal(part.find(0).key_scale, one)
    assert torch.equal(part.find(0).value_scale, one * 2)


def rebuilt(whole, layers, form=None):
    return StaticScales(form or whole.format, HEADS, WIDTH, layers)


def test_the_digest_knows_every_number():
    whole = scales("int4_static")
    same = {1: whole.layers[1], 0: whole.layers[0]}
    assert rebuilt(whole, same).digest() == whole.digest()
    digests = {whole.digest()}
    for index in (0, 1):
        for plane in PLANES:
            altered = getattr(whole.layers[index], plane).clone()
            altered[3, 31] += 1e-3
            other = {**whole.layers, index: replace(whole.layers[index], **{plane: altered})}
            digests.add(rebuilt(whole, other).digest())
    assert len(digests) == 9


def test_the_digest_knows_whose_a_number_is():
    first, second = (scales("int4_static").layers[0] for _ in range(2))
    whole = rebuilt(scales("int4_static"), {0: first, 1: second})
    swapped = replace(
        first,
        key_scale=first.value_scale,
        value_scale=first.key_scale,
        key_zero=first.value_zero,
        value_zero=first.key_zero,
    )
    others = [
        {0: second, 1: first},
        {0: first, 2: second},
        {0: first},
        {0: swapped, 1: second},
    ]
    digests = {whole.digest(), *(rebuilt(whole, each).digest() for each in others)}
    renamed = replace(whole.format, name="other")
    digests.add(rebuilt(whole, whole.layers, renamed).digest())
    assert len(digests) == 6
