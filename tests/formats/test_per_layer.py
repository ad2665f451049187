"""LayerFormats: one format, keys and values apart, and exceptions for some layers."""

from dataclasses import replace

import pytest

from quantpage.errors import FormatError
from quantpage.formats import FORMATS, find_format
from quantpage.formats.per_layer import LayerFormats, split_choices

pytestmark = pytest.mark.pure


def names(text, layers):
    return [each.name for each in LayerFormats.parse(text).of_layers(layers)]


def test_one_name_serves_all_layers():
    formats = LayerFormats.parse("int8")
    assert formats.name == "int8"
    assert [each.name for each in formats.of_layers(3)] == ["int8"] * 3


def test_first_and_last_layers():
    formats = LayerFormats.parse("int4, first2=int8 ,last1=none")
    assert formats.name == "int4,first2=int8,last1=none"
    assert names(formats.name, 5) == ["int8", "int8", "int4", "int4", "none"]
    assert names(formats.name, 3) == ["int8", "int8", "none"]


def test_any_layers():
    text = "int4,layers=0-1,4:int8,layers=2:none"
    assert names(text, 6) == ["int8", "int8", "none", "int4", "int8", "int4"]
    assert LayerFormats.parse(text).name == text
    assert names("int4,last1=fp8,layers=1, 2 :int8", 4) == ["int4", "int8", "int8", "fp8"]


def test_keys_and_values_by_name():
    assert find_format("k=int8,v=int4") is FORMATS["k8v4"], "under its own name where it has one"
    assert find_format("k=int8,v=int8_per_token_head") is FORMATS["int8"]
    assert find_format("v=int4,k=int8") is FORMATS["k8v4"]
    pair = find_format("k=fp8,v=int4")
    assert pair.name == "k=fp8,v=int4"
    assert pair.key == FORMATS["fp8"].key and pair.value == FORMATS["int4"].value
    assert pair.exact_pages == FORMATS["int4"].exact_pages
    assert find_format("k=fp8,v=int8").exact_pages is None
    text = "k=fp8,v=int4,first1=k=none,v=int8,layers=2,3:k=int8,v=fp8"
    assert names(text, 5) == [
        "k=none,v=int8", "k=fp8,v=int4", "k=int8,v=fp8", "k=int8,v=fp8", "k=fp8,v=int4",
    ]  # fmt: skip
    assert LayerFormats.parse(text).name == text
    assert LayerFormats.parse(LayerFormats.parse(text).name) == LayerFormats.parse(text)


def test_several_choices_in_one_text():
    text = "none, int4,first2=int8,layers=4,6-7:fp8,k=int8,v=fp8,last1=k=none,v=int4,int8"
    assert split_choices(text) == [
        "none", "int4,first2=int8,layers=4,6-7:fp8", "k=int8,v=fp8,last1=k=none,v=int4", "int8",
    ]  # fmt: skip
    assert split_choices("") == []
    with pytest.raises(ValueError, match="formats: expected names separated by commas, got ' , '"):
        split_choices(" , ")


def test_a_misspelled_rule_stays_with_its_choice():
    assert split_choices("int8,int4,layer=3:int8") == ["int8", "int4,layer=3:int8"]


def test_which_layers_have_which_format():
    formats = LayerFormats.parse("int4,first2=int8,layers=4,6-7:fp8,last1=int8")
    assert {form.name: words for form, words in formats.places().items()} == {
        "int4": "the others", "int8": "first 2, last 1", "fp8": "4, 6-7",
    }  # fmt: skip
    assert {form.name: words for form, words in formats.places(10).items()} == {
        "int4": "2-3, 5, 8", "int8": "0-1, 9", "fp8": "4, 6-7",
    }  # fmt: skip
    assert LayerFormats.parse("int8").places() == {FORMATS["int8"]: "all"}
    covered = LayerFormats.parse("int4,first2=int8").places(2)
    assert covered == {FORMATS["int8"]: "0-1"}, "a format that no layer has is not listed"


def test_a_format_of_ones_own():
    mine = replace(FORMATS["int8"], name="mine", exact_pages=FORMATS["int4"].exact_pages)
    assert LayerFormats.of(mine).of_layers(2) == (mine, mine)
    formats = LayerFormats.parse("int8,last1=int4")
    assert LayerFormats.of(formats) is formats
    assert LayerFormats.of("int4") == LayerFormats.parse("int4")
    with pytest.raises(ValueError, match="kv_format: expected a name, a KVFormat"):
        LayerFormats.of(8)


def test_aliases_are_named_by_our_name():
    assert LayerFormats.parse("auto,last3=int8_per_token_head").name == "none,last3=int8"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got ''"),
        ("int8,", "got ''"),
        ("layers=0-3:int8", "a format for all other layers first, such as int4,layers=0-3:int8"),
        ("first2=int8,int4", "a format for all other layers first"),
        ("int8,layer=0:int4", r"got 'layer=0:int4' \(did you mean layers=0:int4\?\)"),
        ("int8,frist2=int4", r"got 'frist2=int4' \(did you mean first2=int4\?\)"),
        ("int8,Last1=int4", r"got 'Last1=int4' \(did you mean last1=int4\?\)"),
        ("int8,first0=int4", "got 'first0=int4'"),
        ("int8,middle2=int4", "got 'middle2=int4'"),
        ("int8,first2=int9", r"got 'int9' \(did you mean int8\?\)"),
        ("INT8", r"got 'INT8' \(did you mean int8\?\)"),
        ("int8,first1=int4,first2=int4", "one rule for first"),
        ("int8,layers=3", "got 'layers=3'"),
        ("int8,layers=:int4", "expected layers such as 0-3,20"),
        ("int8,layers=5-2:int4", "expected layers such as 0-3,20"),
        ("int8,layers=-1:int4", "expected layers such as 0-3,20"),
        ("k=int8", "values by name, such as k=int8,v=int8; got 'k=int8'"),
        ("k=int8,w=int4", "got 'k=int8'"),
        ("v=int8,first1=int4", "such as v=int8,k=int8; got 'v=int8'"),
        ("k=int8,v=int4,k=int8", "got 'k=int8'"),
        ("k=int8,v=int9", "got 'int9'"),
        ("k=int8,v=", "got ''"),
    ],
)
def test_bad_rules_are_named(text, words):
    with pytest.raises(FormatError, match=words):
        LayerFormats.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8,first2=int4,last1=none", "two for layer 1 of 2: first2=int4 and last1=none"),
        ("int8,first3=int4", "expected layers of 0 to 1, got first3=int4"),
        ("int8,last3=int4", "expected layers of 0 to 1, got last3=int4"),
        ("int8,layers=0,2:int4", "expected layers of 0 to 1, got layers=0,2:int4"),
        ("int8,layers=0-1:int4,layers=1:fp8", "two for layer 1 of 2"),
    ],
)
def test_rules_that_do_not_fit_a_model_are_named(text, words):
    with pytest.raises(FormatError, match=words):
        LayerFormats.parse(text).of_layers(2)


def test_static_formats_are_refused_anywhere():
    LayerFormats.parse("int8,last1=int4").refuse_static()
    for text in (
        "fp8_static",
        "int8,first1=int8_static",
        "int8,last1=int4_static",
        "int8,layers=0:k=int8,v=fp8_static",
    ):
        with pytest.raises(FormatError, match="is static"):
            LayerFormats.parse(text).refuse_static()
