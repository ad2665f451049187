"""Choosing: in order, by refusals, never silently."""

import pytest
import torch

from quantpage.attention import BACKENDS, build_attention, find_backend
from quantpage.errors import NoImplementation
from quantpage.formats import FORMATS
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask, RowIntervals
from quantpage.ops.dispatch import Call, Implementation, choose

pytestmark = pytest.mark.pure

CALL = Call(
    device=DeviceInfo("cpu", "a CPU", None, 2),
    format=FORMATS["int8"],
    dtype=torch.bfloat16,
    q_heads=8,
    kv_heads=2,
    head_dim=64,
    value_head_dim=64,
    page_size=64,
)


def candidate(name, *reasons):
    return Implementation(name, "math:sqrt", lambda call: list(reasons))


def test_the_first_that_does_not_refuse():
    picky, second, third = candidate("picky", "needs a GPU."), candidate("b"), candidate("c")
    assert choose([picky, second, third], CALL) is second


def test_a_named_choice_never_falls_back():
    with pytest.raises(NoImplementation, match="picky: needs a GPU"):
        choose([candidate("picky", "needs a GPU."), candidate("b")], CALL, "picky")


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="expected one of a, b; got 'd'"):
        choose([candidate("a"), candidate("b")], CALL, "d")


def test_when_all_refuse_every_reason_is_told():
    with pytest.raises(NoImplementation, match=r"(?s)int8 on a CPU.*a: one\. two\..*b: three"):
        choose([candidate("a", "one.", "two."), candidate("b", "three.")], CALL)


def test_backends_refuse_masks_in_a_sentence():
    rows = RowIntervals(torch.tensor([[[[[0, 1]]]]]))
    with pytest.raises(NoImplementation, match="flash takes a causal or full mask, got interval"):
        build_attention("flash", rows, CALL)
    assert build_attention(BACKENDS["flash"], CausalMask(), CALL, "torch").decode.name == "torch"


def test_an_unknown_backend_lists_the_names():
    with pytest.raises(ValueError, match="backend: expected one of flash, flash_mask"):
        find_backend("flashinfer")
