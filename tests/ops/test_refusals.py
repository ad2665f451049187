"""Refusals: one vocabulary, and the same in a candidate's row and at its entry."""

import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from quantpage.explain import DEVICES, example_call
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec
from quantpage.hardware import DeviceInfo
from quantpage.ops import attend, gather, refusals, rope_write
from quantpage.ops.checks import needs_of

pytestmark = pytest.mark.cpu

CANDIDATES = [*attend.CANDIDATES, *rope_write.CANDIDATES, *gather.CANDIDATES]
TURING = DeviceInfo("cuda", "an older GPU", (7, 5), 40)
ODD = [
    FORMATS["none"],
    KVFormat("groups of 48", *[QuantSpec(CODES["int8"], Granularity(group=48))] * 2),
    KVFormat("wide scales", *[QuantSpec(CODES["int4"], scale_dtype=torch.float64)] * 2),
    KVFormat("another code", *[QuantSpec(replace(CODES["int8"], name="int7", qmax=63))] * 2),
]


def calls():
    for device, form, mask, phase, dtype, width in product(
        [*DEVICES.values(), TURING],
        ODD,
        ["causal", "interval", "asked"],
        ["prefill", "decode"],
        [torch.float32, torch.float64],
        [96, 528],
    ):
        call = example_call(device, form, mask)
        yield replace(
            call, phase=phase, dtype=dtype, head_dim=width, value_head_dim=width, in_turn=True
        )


def test_every_sentence_says_what_is_needed_and_what_came():
    said = {each for call in calls() for who in CANDIDATES for each in who.refusals(call)}
    assert len(said) > 30
    absent = ("needs Triton, ", "needs Triton 3.6", "no compiled core")
    for each in said:
        assert re.fullmatch(r"needs .+, got .+\.", each) or each.startswith(absent), each
    # One way to say a thing: no two sentences differ in how they name what came.
    wanted = {each.partition(", got ")[0] for each in said}
    assert len({each.casefold().replace("expected", "needs") for each in wanted}) == len(wanted)


def test_torch_serves_every_call():
    for call in calls():
        for op in (attend, rope_write, gather):
            assert [each.name for each in op.CANDIDATES if not each.refusals(call)][-1:] == [
                "torch"
            ]


@pytest.mark.parametrize("each", CANDIDATES, ids=lambda each: each.target)
def test_the_entry_of_a_candidate_asks_what_its_row_says(each):
    if each.name in ("triton", "gluon") and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if each in gather.CANDIDATES or each.name == "torch":
        # Gathers are asked by device alone; torch serves all.
        assert needs_of(each.load()).refusals is refusals.NOTHING
    else:
        assert needs_of(each.load()).refusals is each.refusals


def test_what_is_first_is_said_alone():
    call = example_call(TURING, ODD[2])
    assert refusals.CPU(call) == ["needs a CPU, got cuda."]
    assert len(refusals.DECODE_GLUON(replace(call, head_dim=48, dtype=torch.float64))) > 4
