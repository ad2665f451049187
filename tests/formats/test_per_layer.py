"""LayerFormats: one format, and exceptions for the first and last layers."""

import pytest

from quantpage.errors import FormatError
from quantpage.formats.per_layer import LayerFormats

pytestmark = pytest.mark.pure


def test_one_name_serves_all_layers():
    formats = LayerFormats.parse("int8")
    assert formats.name == "int8"
    assert [each.name for each in formats.of_layers(3)] == ["int8"] * 3


def test_first_and_last_layers():
    formats = LayerFormats.parse("int4, first2=int8 ,last1=none")
    assert formats.name == "int4,first2=int8,last1=none"
    names = [each.name for each in formats.of_layers(5)]
    assert names == ["int8", "int8", "int4", "int4", "none"]
    assert [each.name for each in formats.of_layers(3)] == ["int8", "int8", "none"]
    with pytest.raises(FormatError, match="at most 2 layers, got 2 \\+ 1"):
        formats.of_layers(2)


def test_aliases_are_named_by_our_name():
    assert LayerFormats.parse("auto,last3=int8_per_token_head").name == "none,last3=int8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got ''"),
        ("int8,", "got ''"),
        ("int8,first0=int4", "got 'first0=int4'"),
        ("int8,middle2=int4", "got 'middle2=int4'"),
        ("int8,first2=int3", "got 'int3'"),
        ("int8,first1=int4,first2=int4", "one rule for first"),
    ],
)
def test_bad_rules_are_named(text, words):
    with pytest.raises(FormatError, match=words):
        LayerFormats.parse(text)


def test_static_formats_are_refused_anywhere():
    LayerFormats.parse("int8,last1=int4").refuse_static()
    for text in ("fp8_static", "int8,first1=int8_static", "int8,last1=int4_static"):
        with pytest.raises(FormatError, match="is static"):
            LayerFormats.parse(text).refuse_static()
