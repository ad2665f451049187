"""What the plugin says to vLLM, as far as no vLLM is needed for it."""

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from quantpage.errors import FormatError, NoImplementation
from quantpage.formats import FORMATS, find_format
from quantpage.integrations.vllm_plugin.formats import (
    FP8,
    NAMES,
    OWN_NAMES,
    check_additional,
    check_block_size,
    exact_page,
    exact_token_bytes,
    format_of,
    refuse_layer,
    token_bytes,
    wants_warm_up,
)

pytestmark = pytest.mark.pure


def test_vllm_finds_the_plugin():
    (ours,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "quantpage"]
    assert ours.value == "quantpage.integrations.vllm_plugin:register"
    code = (
        "import sys, quantpage.integrations.vllm_plugin.formats as f\n"
        "print(callable(f) or [m for m in ('vllm', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_quantized_format_with_scales_of_its_own_has_a_name():
    names = {"int8", "int8_exact", "fp8", "int6", "int4", "k8v4", "int3"}
    near = {f"{name}_near8" for name in ("int4", "k8v4", "int3")}
    assert set(OWN_NAMES) == {f"quantpage_{name}" for name in names | near}
    for name in OWN_NAMES:
        assert format_of(name) == find_format(name.removeprefix("quantpage_"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("auto", "none"),
        ("bfloat16", "none"),
        ("int8_per_token_head", "int8"),
        ("fp8_per_token_head", "fp8"),
        ("int4_per_token_head", "int4"),
    ],
)
def test_names_of_vllm(name, wanted):
    assert format_of(name) is FORMATS[wanted]


def test_fp8_of_vllm_has_one_given_scale_a_tensor():
    assert format_of("fp8") is FP8 and format_of("fp8_e4m3") is FP8
    for spec in (FP8.key, FP8.value):
        assert spec.granularity.scale_shape(8, 128) == (1, 1) and not spec.dynamic


def test_additional_config_chooses_where_vllm_has_no_name():
    chosen = {"quantpage": "k8v4", "other": 1}
    assert format_of("int4_per_token_head", chosen) is FORMATS["k8v4"]
    assert format_of("int4_per_token_head", {"quantpage": "int8_exact"}) is FORMATS["int8_exact"]
    # Layers that are left out stay as they are.
    assert format_of("auto", chosen) is FORMATS["none"]
    assert format_of("int4_per_token_head", {}) is FORMATS["int4"]


@pytest.mark.parametrize(
    ("name", "additional", "said"),
    [
        ("fp8_e5m2", None, "--kv-cache-dtype: expected one of auto, .*got 'fp8_e5m2'"),
        ("quantpage_int2", None, "--kv-cache-dtype: expected one of .*quantpage_int4"),
        (
            "int8_per_token_head",
            {"quantpage": "int9"},
            "--additional-config quantpage: expected one of int8, .*int3_near8; got 'int9'",
        ),
        ("int8_per_token_head", {"quantpage": "none"}, "expected one of int8, .*got 'none'"),
        ("int8_per_token_head", {"quantpage": "int8_static"}, "got 'int8_static'"),
    ],
)
def test_names_that_cannot_be_served_are_refused(name, additional, said):
    with pytest.raises((ValueError, FormatError), match=said):
        format_of(name, additional)


def test_names_that_this_vllm_does_not_take_are_not_offered():
    with pytest.raises(ValueError, match="int4_per_token_head; got 'nvfp4'"):
        format_of("nvfp4", own_names=False)


@pytest.mark.parametrize(
    ("name", "additional", "said"),
    [
        ("fp8", {"quantpage": "k8v4"}, " quantpage: expected .* int8_per_token_head or .*got fp8"),
        ("auto", {"quantpage": "int4"}, " quantpage: expected --kv-cache-dtype .*, got auto"),
        ("auto", {"quantpage_warmup": True}, ": expected .*, quantpage_warm_up; got 'quantpage_w"),
        ("int4_per_token_head", {"quantpage_warm_up": "yes"}, "expected true or false, got 'yes'"),
        ("auto", {"quantpage_calibration": True}, "calibration: expected a file, got True"),
    ],
)
def test_what_nobody_would_follow_is_refused(name, additional, said):
    with pytest.raises(ValueError, match=f"--additional-config.*{said}"):
        check_additional(additional, name)


def test_what_is_said_to_others_is_theirs():
    check_additional(None, "auto")
    check_additional({"other": 1, "quantpage_calibration": "file"}, "auto")
    check_additional({"quantpage": "k8v4", "quantpage_warm_up": True}, "int4_per_token_head")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("none", 512), ("int8", 260), ("fp8", 260), ("int4", 136), ("k8v4", 198), ("int6", 200),
        ("int3", 104),
    ],
)  # fmt: skip
def test_bytes_a_token_and_head(name, wanted):
    assert token_bytes(FORMATS[name], (128, 128), torch.bfloat16) == wanted


# Two 16-bit rows of 128 channels are 512 bytes.
@pytest.mark.parametrize(
    ("name", "block", "page"),
    [
        ("int4", 256, 64), ("int4", 128, 32), ("int4", 64, 16), ("k8v4", 192, 64),
        ("k8v4", 256, 64), ("k8v4", 128, 32), ("int8_exact", 128, 64), ("int8_exact", 64, 32),
        ("int8_exact", 32, 16), ("int3", 320, 64), ("int3", 256, 32), ("int4_near8", 128, 64),
        ("int4_near8", 64, 32), ("k8v4_near8", 128, 64), ("int3_near8", 192, 64),
    ],
)  # fmt: skip
def test_an_exact_page_fits_into_a_block_of_codes(name, block, page):
    form = find_format(name)
    assert exact_page(form, block, (128, 128), torch.bfloat16) == page
    room = block * token_bytes(form, (128, 128), torch.bfloat16)
    token = 512 if form.near is None else 260
    assert exact_token_bytes(form, (128, 128), torch.bfloat16) == token
    assert page * token <= room and block % page == 0
    assert page == 64 or 2 * page * token > room or block % (2 * page)


@pytest.mark.parametrize(
    ("name", "block", "least"),
    [
        ("int4", 16, 64),
        ("int4", 48, 64),
        ("k8v4", 32, 48),
        ("int8_exact", 16, 32),
        ("int4", 72, 64),
    ],
)
def test_a_block_too_small_for_an_exact_page_is_refused(name, block, least):
    form = FORMATS[name]
    said = (
        f"--block-size: {name} keeps exact pages .* a multiple of 16 from {least} on, got {block}"
    )
    with pytest.raises(ValueError, match=said):
        exact_page(form, block, (128, 128), torch.bfloat16)
    # What the sentence advises is served.
    assert exact_page(form, least, (128, 128), torch.bfloat16) >= 16


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("int8", {"alibi": True}, "ALiBi is not served"),
        ("none", {"attn_type": "encoder_only"}, "decoder layers .* type encoder_only"),
        ("int8", {"unknown": ["sparse", "chunk"]}, "attention with chunk, sparse is not served"),
        ("k8v4", {"shared": True}, "k8v4 keeps exact pages, which layers that read another"),
        ("int4", {"skips": True}, "int4 keeps exact pages, .*--kv-cache-dtype-skip-layers"),
        ("int4", {"one_group": True}, "int4 keeps exact pages, .*--disable-hybrid-kv-cache-man"),
        ("k8v4", {"drafts": True}, "k8v4 keeps exact pages, .* draft model .* n-gram drafts go"),
    ],
)
def test_layers_that_cannot_be_served_are_refused_in_a_sentence(name, asked, said):
    with pytest.raises(NoImplementation, match=f"QuantPage cannot serve this model.*{said}"):
        refuse_layer(FORMATS[name], **asked)


def test_all_reasons_come_at_once():
    with pytest.raises(NoImplementation) as raised:
        refuse_layer(FORMATS["int4"], attn_type="encoder", alibi=True, shared=True)
    assert len(re.findall("ALiBi|decoder layers|another layer", str(raised.value))) == 3


@pytest.mark.parametrize("name", NAMES)
def test_plain_layers_are_served_by_every_format(name):
    form = format_of(name)
    refuse_layer(form)
    if form.exact_pages is None:
        refuse_layer(form, shared=True, skips=True, one_group=True, drafts=True)


def test_blocks_that_no_page_divides_are_refused():
    for size in (16, 32, 48, 528):
        check_block_size(size)
    with pytest.raises(ValueError, match="--block-size: expected a multiple of 16, got 8"):
        check_block_size(8)


def test_a_warm_up_is_left_out_by_false():
    assert wants_warm_up(None) and wants_warm_up({"quantpage": "k8v4"})
    assert not wants_warm_up({"quantpage_warm_up": False})
    with pytest.raises(ValueError, match="quantpage_warm_up: expected true or false, got 'yes'"):
        wants_warm_up({"quantpage_warm_up": "yes"})
