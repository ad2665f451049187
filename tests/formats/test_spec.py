"""Code, Granularity, QuantSpec, KVFormat: shapes, bits, and what cannot be built."""

import pytest
import torch

from quantpage.errors import FormatError
from quantpage.formats import CODES, ExactPages, Granularity, KVFormat, QuantSpec

pytestmark = pytest.mark.pure

INT4, INT8, FP8, NONE = (CODES[name] for name in ("int4", "int8", "fp8", "none"))


@pytest.mark.parametrize(
    ("spec", "head_dim", "bits"),
    [
        (QuantSpec(INT8), 64, 8.25),
        (QuantSpec(INT8), 128, 8.125),
        (QuantSpec(INT8, zero_point=True), 64, 8.5),
        (QuantSpec(INT8, Granularity(32)), 96, 8.5),
        (QuantSpec(INT8, scale_dtype=torch.float32), 64, 8.5),
        (QuantSpec(FP8), 80, 8.2),
        (QuantSpec(INT4, zero_point=True), 64, 4.5),
        (QuantSpec(INT4, Granularity(32), zero_point=True), 128, 5.0),
        (QuantSpec(INT8, Granularity(group=1), dynamic=False), 64, 8.0),
        (QuantSpec(NONE), 64, 16.0),
    ],
)
def test_bits_per_value_count_scales_and_zeros(spec, head_dim, bits):
    assert spec.bits_per_value(head_dim) == pytest.approx(bits)


def test_granularity_shapes():
    assert Granularity().scale_shape(8, 128) == (8, 1)
    assert Granularity(group=32).scale_shape(8, 128) == (8, 4)
    assert Granularity(group=1).scale_shape(8, 128) == (8, 128)
    assert Granularity(per_head=False).scale_shape(8, 128) == (1, 1)
    with pytest.raises(FormatError, match="divisor of head_dim 80, got 32"):
        Granularity(32).groups(80)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"code": NONE, "zero_point": True}, "take no zero or rotation"),
        ({"code": NONE, "rotation": "hadamard"}, "take no zero or rotation"),
        ({"code": FP8, "zero_point": True}, "fp8 codes are signed floats"),
        ({"code": INT8, "granularity": Granularity(per_head=False)}, "one token and kv_head"),
        ({"code": INT8, "granularity": Granularity(group=8)}, "at least 16 channels, got 8"),
        ({"code": INT8, "scale_dtype": torch.bfloat16}, "got torch.bfloat16"),
    ],
)
def test_impossible_specs_fail_when_built(arguments, words):
    with pytest.raises(FormatError, match=words):
        QuantSpec(**arguments)


def test_exact_pages_need_codes():
    with pytest.raises(FormatError, match="plain: exact_pages need a quantized format"):
        KVFormat("plain", QuantSpec(NONE), QuantSpec(NONE), ExactPages())


def test_a_format_is_dynamic_when_no_half_needs_a_given_scale():
    given = QuantSpec(INT8, dynamic=False)
    assert KVFormat("x", QuantSpec(INT8), QuantSpec(NONE)).dynamic
    assert not KVFormat("x", QuantSpec(INT8), given).dynamic
    assert KVFormat("x", QuantSpec(NONE), QuantSpec(INT8)).quantized
