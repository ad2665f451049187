"""FORMATS and ALIASES: names, recipes and their budgets."""

import pytest
import torch

from quantpage.errors import FormatError
from quantpage.formats import ALIASES, FORMATS, dequantize, find_format, quantize
from tests.tolerances import rounding_error

pytestmark = pytest.mark.pure


def test_a_format_is_listed_under_its_own_name():
    assert all(name == each.name for name, each in FORMATS.items())
    assert all(each.summary for each in FORMATS.values())


def test_aliases_lead_to_formats_and_hide_none():
    assert set(ALIASES.values()) <= set(FORMATS)
    assert not set(ALIASES) & set(FORMATS)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("block_wise_fp8", "fp8"),
        ("fp8_per_token_head", "fp8"),
        ("int8_per_token_head", "int8"),
        ("int4_per_token_head", "int4"),
        ("cache_int8", "int8_static"),
        ("cache_fp8", "fp8_static"),
        ("fp8_e4m3", "fp8_static"),
        ("cache_int4_zp", "int4_static"),
        ("auto", "none"),
        ("k8v4", "k8v4"),
    ],
)
def test_names_of_other_systems_are_found(alias, name):
    assert find_format(alias) is FORMATS[name]


@pytest.mark.parametrize("name", ["", "int9", "INT8", "int8 "])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(FormatError, match=r"expected one of none, int8, .*; got") as caught:
        find_format(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "head_dim", "budget"),
    [
        ("int8", 64, 8.5),
        ("int8_exact", 64, 8.5),
        ("fp8", 64, 8.5),
        ("int4", 64, 4.6),
        ("int4", 128, 4.6),
        ("k8v4", 64, 6.5),
        ("int6", 64, 6.5),
        ("int3", 64, 3.5),
        ("int4_static", 64, 4.0),
    ],
)
def test_the_body_stays_within_its_budget(name, head_dim, budget):
    found = FORMATS[name]
    halves = (found.key.bits_per_value(head_dim), found.value.bits_per_value(head_dim))
    assert sum(halves) / 2 <= budget


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.dynamic])
def test_a_format_keeps_rows_of_every_usual_head_dim(name, head_dim):
    """To the error of its bits, or it says which head_dim its groups do not divide."""
    for spec in (FORMATS[name].key, FORMATS[name].value):
        rows = torch.randn(8, head_dim)
        group = spec.granularity.group
        if group is not None and head_dim % group:
            with pytest.raises(FormatError, match=f"expected a divisor of head_dim {head_dim}"):
                quantize(rows, spec)
            continue
        made = quantize(rows, spec)
        if spec.quantized:
            assert made.codes.shape == (8, spec.code.stored(head_dim))
            assert made.scale.shape == (8, spec.granularity.groups(head_dim))
        error = (dequantize(*made, spec) - rows).norm() / rows.norm()
        assert error <= rounding_error(spec)
