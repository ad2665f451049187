"""`quantpage explain` as a page and as data, and `quantpage doctor`."""

import json

import pytest

from quantpage.cli.app import run
from quantpage.doctor import Finding
from quantpage.formats import FORMATS

pytestmark = pytest.mark.cpu


def test_the_page_says_device_kernels_and_each_refusal_once(quantpage):
    said = quantpage("explain", "--device", "cpu", columns=80).out
    for word in ("device", "compiled core", "instruction set", "triton", "transformers"):
        assert word in said
    lines = said.splitlines()
    for name in FORMATS:
        (row,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(row.split()) == 5
    sentences = [line for line in lines if line.endswith(".") and line[0] != " "]
    assert len(sentences) == len(set(sentences)) >= 2
    assert sum("every format" in line for line in lines) >= 2
    assert max(len(line) for line in lines if line[:1] == " " and "format" not in line) <= 80


def test_why_asks_every_candidate(quantpage):
    said = quantpage("explain", "--device", "cpu", "--why", "block_wise_fp8", "decode").out
    assert said.startswith("fp8, decode") and "torch: " in said and "CUDA" in said
    assert sum(line.endswith(": runs") for line in said.splitlines()) == 1
    assert "op: expected one of" in quantpage("explain", "--why", "int8", "swim", code=2).err
    assert "kv_format: expected" in quantpage("explain", "--why", "int99", "decode", code=2).err


def test_formats_a_layer_are_rows(quantpage):
    given = ["explain", "--device", "cpu", "--kv-format", "k=int8,v=fp8,first1=int8", "--json"]
    data = json.loads(quantpage(*given).out)
    (kind,) = data["kinds"]
    assert list(dict.fromkeys(e["format"] for e in kind["choices"])) == ["k=int8,v=fp8", "int8"]
    assert kind["formats"] == {"k=int8,v=fp8": "the others", "int8": "first 1"}


def test_of_a_model_it_says_which_layers(quantpage, folder):
    given = ("explain", "--device", "cpu", "--model", folder, "--kv-format")
    page = quantpage(*given, "int4,layers=0,2:k=fp8,v=int8").out
    rows = [line.split() for line in page.splitlines() if " cpu " in line]
    assert [row[:2] for row in rows[-2:]] == [["int4", "1"], ["k=fp8,v=int8", "0,"]]
    assert "expected layers of 0 to 2" in quantpage(*given, "int4,layers=3:int8", code=2).err


def test_the_same_as_data(quantpage):
    given = ["explain", "--device", "cpu", "--kv-format", "int4", "--json"]
    data = json.loads(quantpage(*given).out)
    (kind,) = data["kinds"]
    assert [each["op"].split()[-1] for each in kind["choices"]] == [
        "rope_write", "prefill", "decode", "gather",
    ]  # fmt: skip
    assert kind["call"]["head_dim"] == 128 and data["environment"]["torch"]
    (data,) = json.loads(quantpage("explain", "--why", "int4", "gather", "--json").out)
    assert data["chosen"] in {each["implementation"] for each in data["candidates"]}


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory):
    """A configuration whose every third layer has wider heads."""
    pytest.importorskip("transformers")
    from transformers import Gemma4TextConfig

    folder = tmp_path_factory.mktemp("two_kinds")
    Gemma4TextConfig(
        num_hidden_layers=6,
        head_dim=64,
        global_head_dim=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ).save_pretrained(folder)
    return folder


def test_layers_with_heads_of_two_kinds_are_told_apart(quantpage, two_kinds):
    given = ("explain", "--device", "cpu", "--model", two_kinds)
    page = quantpage(*given, "--kv-format", "int8,last2=int4").out
    rows = [line.split() for line in page.splitlines() if line.startswith(" int")]
    assert [(row[0], " ".join(row[1:-4])) for row in rows] == [
        ("int8", "0-1, 3"), ("int4", "4"), ("int8", "2"), ("int4", "5"),
    ]  # fmt: skip
    assert "head_dim 64, page_size 64, bfloat16, causal mask; layers: 0-1, 3-4\n" in page
    assert "head_dim 512, page_size 64, bfloat16, causal mask; layers: 2, 5\n" in page
    # Refusals stand once below both tables.
    assert page.count("Who refused") == page.count("got 512 and 512.") == 1
    data = json.loads(quantpage(*given, "--json").out)
    assert [each["layers"] for each in data["kinds"]] == ["0-1, 3-4", "2, 5"]
    assert [each["call"]["head_dim"] for each in data["kinds"]] == [64, 512]


def test_why_asks_for_every_kind_of_layer(quantpage, two_kinds):
    given = ("explain", "--device", "cpu", "--model", two_kinds, "--why", "int8,last2=int4")
    said = json.loads(quantpage(*given, "decode", "--json").out)
    assert [(each["format"], each["layers"], each["call"]["head_dim"]) for each in said] == [
        ("int8", "0-1, 3", 64), ("int4", "4", 64), ("int8", "2", 512), ("int4", "5", 512),
    ]  # fmt: skip
    for each in said:
        reasons = str(each["candidates"])
        assert [f"got {size} and {size}." in reasons for size in (64, 512)] == [
            each["call"]["head_dim"] == size for size in (64, 512)
        ]
    page = quantpage(*given, "decode").out
    assert sum(line.endswith(": runs") for line in page.splitlines()) == 4
    refused = quantpage(*given, "decode", "--kv-format", "int4", code=2).err
    assert "why: expected no --kv-format beside it, got int4" in refused


def test_the_doctor_is_content_here(quantpage):
    done = quantpage("doctor")
    assert "everything here works" in done.out
    assert "self-test, cpu: torch" in done.out and "agree with float64" in done.out
    data = json.loads(quantpage("doctor", "--json", "--quiet").out)
    assert {"python", "torch", "memory"} <= {each["about"] for each in data}


def test_the_doctor_fails_where_something_is_wrong(capsys, monkeypatch):
    found = [Finding("core", "bad", "broken", "mend it"), Finding("x", "note", "slow", "hurry")]
    monkeypatch.setattr("quantpage.doctor.examine", lambda: iter(found))
    assert run(["doctor"]) == 4
    said = capsys.readouterr().out
    assert "WRONG" in said and "-> mend it" in said and "1 of these do not work; 1 could" in said
