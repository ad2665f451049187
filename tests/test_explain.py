"""Who runs and who refused, as data."""

import pytest
import torch

from quantpage.explain import OPS, Choice, candidates_of, distinct_refusals, example_call, explain
from quantpage.formats import FORMATS
from quantpage.hardware import DeviceInfo, device_info

pytestmark = pytest.mark.cpu


def test_every_sentence_stands_once_with_all_that_it_concerns():
    choices = [
        Choice("rope_write", "a", "z", (("x", "no."), ("y", "no."))),
        Choice("gather", "a", "z", (("x", "no."), ("x", "never."))),
        Choice("gather", "b", "z", (("x", "no."),)),
    ]
    no, never = distinct_refusals(choices)
    assert (no.sentence, never.sentence) == ("no.", "never.")
    assert no.cases == (
        (("x", "y"), ("rope_write",), ("a",)),
        (("x",), ("gather",), ("a", "b")),
    )
    assert never.cases == ((("x",), ("gather",), ("a",)),)


def test_nothing_is_lost_or_added():
    """The grouped cases, spelled out again, are what was said."""
    hopper = DeviceInfo("cuda", "a GPU", (9, 0), 132)
    choices = [
        choice
        for info in (device_info("cpu"), hopper)
        for each in FORMATS.values()
        for choice in explain(example_call(info, each, "interval"))
    ]
    said = {(c.op, c.format, who, why) for c in choices for who, why in c.refusals}
    spelled = {
        (op, name, who, refusal.sentence)
        for refusal in distinct_refusals(choices)
        for whom, ops, names in refusal.cases
        for who in whom
        for op in ops
        for name in names
    }
    assert spelled == said and len(said) > 20


def test_candidates_of_one_op_come_in_order_of_preference():
    call = example_call(device_info("cpu"), FORMATS["int8"])
    said = candidates_of(call, "decode")
    assert said == candidates_of(call, "attend decode")
    assert said[-1] == ("torch", [])
    assert any("CUDA" in " ".join(reasons) for _, reasons in said)
    with pytest.raises(ValueError, match="op: expected one of rope_write, prefill"):
        candidates_of(call, "attention")


@pytest.mark.parametrize("op", OPS)
def test_implementations_of_one_op_are_told_apart(op):
    call = example_call(device_info("cpu"), FORMATS["int8"])
    labels = [who for who, _ in candidates_of(call, op)]
    assert len(set(labels)) == len(labels)


def test_the_example_is_an_8b_llama():
    call = example_call(device_info("cpu"), FORMATS["none"])
    assert (call.q_heads, call.kv_heads, call.head_dim) == (32, 8, 128)
    assert call.dtype is torch.bfloat16
