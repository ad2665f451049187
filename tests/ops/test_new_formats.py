"""Formats that nobody has named, as docs/adding-a-format.md makes them: served right or refused."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.explain import example_call
from quantpage.formats import (
    CODES,
    Granularity,
    KVFormat,
    QuantSpec,
    dequantize,
    quantize,
    rotate,
)
from quantpage.formats.spec import Code
from quantpage.hardware import DeviceInfo, device_info
from quantpage.ops import attend as attend_op
from quantpage.ops import gather, rope_write
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.dispatch import Call
from tests.tolerances import assert_agrees, same_save_ties

pytestmark = pytest.mark.cpu
INT6 = Code("int6", torch.int8, -32, 31, 8)
INT3 = Code("int3", torch.uint8, -4, 3, 4, values_per_byte=2)
SMALL8 = Code("e4m3_small", torch.float8_e4m3fn, -240, 240, 8)
SPECS = {
    "int8_z32": QuantSpec(CODES["int8"], Granularity(group=32), zero_point=True),
    "int8_z16": QuantSpec(CODES["int8"], Granularity(group=16), zero_point=True),
    "int4_z32_rotated": QuantSpec(
        CODES["int4"], Granularity(group=32), zero_point=True, rotation="hadamard"
    ),
    "int6": QuantSpec(INT6, rotation="hadamard"),
    "int6_zero": QuantSpec(INT6, Granularity(group=16), zero_point=True),
    "int3": QuantSpec(INT3, zero_point=True),
    "e4m3_small": QuantSpec(SMALL8),
}
MADE = {name: KVFormat(name, spec, spec, summary="made here") for name, spec in SPECS.items()}


def implementations(candidates):
    return [e for e in candidates if e.name not in ("triton", "gluon")]


def call_of(kv_format):
    return Call(device_info("cpu"), kv_format, torch.float32, 4, 2, 64, 64, 16)


def run_all(name, write, attention, collect):
    """A prompt and a decode step through one choice of implementations; '' or why it refused."""
    kv_format = MADE[name]
    for each in (write, attention, collect):
        reasons = each.refusals(call_of(kv_format))
        if reasons:
            return " ".join(reasons)
    cache = PagedKVCache(3)
    cache.add_layer(0, CacheLayout(2, 64, kv_format, 16, torch.float32))
    q, k, v = (torch.randn(40, heads, 64) for heads in (4, 2, 2))
    layer, batch = cache.layer(0), plan_batch([40], [40], [[2, 0, 1]], 16)
    written = write.load()(q, k, v, layer, batch, rope_write.WriteParams())
    spec = kv_format.key
    turned = {"hadamard": rotate, "none": lambda x: x}[spec.rotation]
    wanted = dequantize(*quantize(turned(k), spec), spec)
    held = collect.load()(layer.key, batch.page_table[0], 40, torch.float32)
    if not spec.code.known:
        torch.testing.assert_close(held, wanted, atol=2e-6, rtol=2e-6)
    same_save_ties(held, wanted, spec)
    params = AttendParams(0.125)
    assert_agrees(
        attend(written.q, layer, batch, params, attention), written.q, layer, batch, params
    )
    return ""


@pytest.mark.parametrize("name", MADE)
def test_every_op_serves_it_or_says_why_not(name):
    write, attention, collect = (
        {each.name: each for each in implementations(op.CANDIDATES)}
        for op in (rope_write, attend_op, gather)
    )
    assert run_all(name, write["torch"], attention["torch"], collect["torch"]) == ""
    said = run_all(name, write["cpu"], attention["cpu"], collect["cpu"])
    if not MADE[name].key.code.known:
        code = MADE[name].key.code
        wanted = f"got {code.name} ({code.qmin:g} to {code.qmax:g} in {code.storage})"
        assert wanted in said or "no compiled core" in said
    else:
        assert said == "" or "no compiled core" in said


@pytest.mark.parametrize("name", [each for each in MADE if not MADE[each].key.code.known])
def test_no_kernel_takes_a_code_that_it_was_not_told_of(name):
    hopper = DeviceInfo("cuda", "a made up GPU", (9, 0), 132)
    ops = (rope_write, attend_op, gather)
    plain = [next(each for each in op.CANDIDATES if each.name == "torch") for op in ops]
    for at, op in enumerate(ops):
        for each in op.CANDIDATES:
            call = example_call(device_info("cpu") if each.name == "cpu" else hopper, MADE[name])
            if not each.refusals(call):
                # Who reads rows as plain torch does knows every code: it answers right.
                assert run_all(name, *plain[:at], each, *plain[at + 1 :]) == "", each.target
                continue
            for mask in ("causal", "interval"):
                reasons = each.refusals(replace(call, mask=mask))
                named = any(MADE[name].key.code.name in reason for reason in reasons)
                absent = any("no compiled core" in reason for reason in reasons)
                assert named or absent, (each.target, reasons)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Code("int12", torch.int16, -2048, 2047, 12), "expected int8 or float8_e4m3fn"),
        (lambda: Code("e5m2", torch.float8_e5m2, -57344, 57344, 8), "got torch.float8_e5m2"),
        (lambda: Code("uint8", torch.uint8, 0, 255, 8), "or uint8 with two"),
        (lambda: Code("int5", torch.uint8, -16, 15, 5, 2), r"within -8..7 of torch.uint8, got -16"),
        (lambda: Code("int9", torch.int8, -256, 255, 9), "within -128..127"),
        (lambda: Code("plus", torch.int8, 0, 127, 7), "around 0"),
        (lambda: Code("int5", torch.int8, -16, 15, 5), "8 bits that a number takes in torch.int8"),
        (lambda: Granularity(group=0), "group: expected at least 1 channel, got 0"),
        (lambda: QuantSpec(CODES["int8"], rotation="givens"), "expected none or hadamard"),
        (lambda: QuantSpec(SMALL8, zero_point=True), "e4m3_small codes are signed floats"),
    ],
)
def test_what_no_row_can_hold_is_refused_when_it_is_built(made, message):
    with pytest.raises(ValueError, match=message):
        made()
