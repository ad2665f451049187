"""Keys that are rounded in turn in the registers of four lanes, against the reference.

Without a GPU their inline PTX runs in numpy (inline_ptx), where the layout is what it must be.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV
from quantpage.formats import FORMATS, KVFormat, find_format, rotate
from quantpage.ops.rope_write import QKNorm, WriteParams, triton_in_turn
from quantpage.ops.rope_write import triton as host
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import Shape, rope_write
from quantpage.ops.rope_write.triton_in_turn_lanes import Lanes
from quantpage.rope import rope_table
from tests.ops.rope_write import inline_ptx
from tests.ops.rope_write.kernel_cases import (
    GROUP,
    KV_HEADS,
    NEAR_FP8,
    PAGE,
    copy_of,
    empty_pages,
    feedback_map,
    losses,
    same_rows,
)
from tests.ops.triton_cases import DEVICE, GPU, TIER

pytestmark = TIER
PLAIN = Shape(4, 2, 2, 32, 1)
LANES = triton_in_turn._lanes
IN_BLOCKS = triton_in_turn._couplings
"""What the kernel of other rows is given."""


class Outputs(list):
    """What the interpreter's builder hands back."""

    def get_result(self, i):
        return self[i]


def run_in_numpy(builder, text, constraints, values, types, is_pure, pack):
    text = str(text)
    operands = [value.data for value in values]
    if "cp.async.cg" in text:
        inline_ptx.copy(text, operands)
    if "prefetch" in text or "cp.async" in text:
        nothing = np.zeros(operands[0].shape, np.int32)
        return Outputs([interpreter.TensorHandle(nothing, tl.int32)])
    found = inline_ptx.run(text, operands, len(types), constraints.count("="))
    kinds = {4: tl.float32, 2: tl.float16}
    return Outputs([interpreter.TensorHandle(x, kinds[x.itemsize]) for x in found])


@pytest.fixture(autouse=True)
def lanes(monkeypatch):
    """Every write of this file goes through lanes."""
    if not GPU:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run_in_numpy)
        monkeypatch.setattr(host, "can_multiply", lambda specs, x, shape: shape.rows == 8)
        monkeypatch.setattr(triton_in_turn, "as_written", lambda compiled: True)

    def other_kernel(*_):
        raise AssertionError("expected rows in lanes")

    monkeypatch.setattr(triton_in_turn, "_couplings", other_kernel)


def written(given, k, v, key_map, params, q=None, cuts=(0, 40)):
    """The layer that rope_write made and the reference's; what they handed back of the last cut."""
    pages = 3
    tables = [list(range(pages))]
    near = tables if given.exact_pages is not None else None
    halves = [empty_pages(spec, k.shape[-1], pages) for spec in (given.key, given.value)]
    exact = (None, None)
    if given.near is not None:
        exact = [
            empty_pages(spec, k.shape[-1], pages) for spec in (given.near.key, given.near.value)
        ]
    elif near is not None:
        shape = (pages, KV_HEADS, PAGE, k.shape[-1])
        exact = [torch.full(shape, torch.nan, dtype=torch.float16, device=DEVICE) for _ in "kv"]
    layer = LayerKV(*halves, *exact, key_map)
    other = copy_of(layer)
    found = ()
    for start, stop in pairwise(cuts):
        batch = plan_batch((stop - start,), (stop + 5,), tables, PAGE, DEVICE, near)
        if q is not None:
            # Nobody's slot.
            batch.slots[1] = -1
        step = [None if x is None else x[start:stop] for x in (q, k, v)]
        found = tuple(
            write(*step, each, batch, params)
            for write, each in ((in_lanes, layer), (reference, other))
        )
    return layer, other, *found


def in_lanes(q, k, v, layer, batch, params):
    return rope_write(q, k, v, layer, batch, params, None if GPU else PLAIN)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in ("int8", "int6", "int4", "int3", "k8v4_near8")),
        ("int4_near8", 128), ("int8", 128), ("near fp8", 64),
        *([("int4", 256), ("int8", 256), ("int4", 128), ("int6", 128)] if GPU else []),
    ],
)  # fmt: skip
def test_codes_are_those_of_the_reference(name, head_dim):
    torch.manual_seed(4)
    key_map = feedback_map(head_dim, True)
    if name == "near fp8":
        given = replace(FORMATS["k8v4"], near=KVFormat("fp8", *[NEAR_FP8] * 2))
    else:
        given = find_format(name)
    q = torch.randn(40, GROUP * KV_HEADS, head_dim, device=DEVICE).half()
    k, v = torch.randn(2, 40, KV_HEADS, head_dim, device=DEVICE).half()
    k = (k + key_map.mean).half()
    # A NaN, a row without any range, a large number, and a row that is nothing.
    k[3, 1, 2], k[4, 0], k[5, 1, 7], k[6] = torch.nan, key_map.mean[0].half(), 6e4, 0.0
    layer, other, got, wanted = written(given, k, v, key_map, WriteParams(return_rows=True), q)
    torch.testing.assert_close(got.q, wanted.q, rtol=1e-2, atol=1e-2)
    assert torch.equal(got.k_rows.isfinite(), wanted.k_rows.isfinite())
    assert same_rows(layer.key, other.key) > 0.97
    if given.near is not None:
        assert same_rows(layer.exact_key, other.exact_key) > 0.97
    elif layer.exact_key is not None:
        torch.testing.assert_close(layer.exact_key, other.exact_key, rtol=2e-3, atol=2e-3,
                                   equal_nan=True)  # fmt: skip
    x = rotate(key_map.keys(k.float().nan_to_num(0.0)))
    rows = torch.arange(40, device=DEVICE) > 6
    mine, theirs = (
        losses(each.k_rows.float(), x, key_map.feedback)[rows] for each in (got, wanted)
    )
    torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_codes_do_not_depend_on_the_cut(name):
    torch.manual_seed(6)
    k, key_map = torch.randn(40, KV_HEADS, 64, device=DEVICE).half(), feedback_map(64, True)
    found = [
        written(find_format(name), k, k, key_map, WriteParams(), None, cuts)[0].key
        for cuts in ((0, 40), (0, 1, 18, 40))
    ]
    assert same_rows(*found) == 1.0


def test_rows_are_turned_as_the_write_does():
    torch.manual_seed(5)
    key_map = feedback_map(64, True, mean=False)
    weights = [torch.rand(64, device=DEVICE) + 0.5 for _ in range(2)]
    heads = (GROUP * KV_HEADS, KV_HEADS, KV_HEADS)
    bias = tuple(torch.randn(h, 64, device=DEVICE).half() for h in heads)
    params = WriteParams(rope_table(64, 64, device=DEVICE), QKNorm(*weights), bias)
    q, k, v = (torch.randn(40, h, 64, device=DEVICE).half() for h in heads)
    layer, other, *_ = written(find_format("int8"), k, v, key_map, params, q)
    assert same_rows(layer.key, other.key) > 0.97


def test_rows_that_lie_elsewhere_are_written_again(monkeypatch):
    """Where the compiler puts rows into other lanes, what was written is nobody's."""
    torch.manual_seed(8)
    k, key_map = torch.randn(40, KV_HEADS, 64, device=DEVICE).half(), feedback_map(64, True)
    monkeypatch.setattr(triton_in_turn, "as_written", lambda compiled: False)
    monkeypatch.setattr(triton_in_turn, "_couplings", IN_BLOCKS)
    monkeypatch.setattr(triton_in_turn, "_lanes", silent)
    layer, other, *_ = written(find_format("int8"), k, k, key_map, WriteParams())
    assert same_rows(layer.key, other.key) > 0.97


def test_what_is_written_again_begins_behind_the_end_of_what_was(monkeypatch):
    """Both write the same pages, and launches of a step overlap on Hopper."""
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **given: seen.update(given)

    monkeypatch.setattr(triton_in_turn, "in_turn_kernel", Kernel())
    monkeypatch.setattr(triton_in_turn, "_written_in_lanes", lambda *_: False)
    monkeypatch.setattr(triton_in_turn, "_couplings", IN_BLOCKS)
    halves = [empty_pages(spec, 64, 1) for spec in (FORMATS["int8"].key, FORMATS["int8"].value)]
    layer = LayerKV(*halves, None, None, feedback_map(64, True))
    for lanes, overlap in ((True, False), (False, True)):
        triton_in_turn.launch(layer, 40, {}, {"OVERLAP": True, "launch_pdl": True}, lanes)
        assert seen["OVERLAP"] == seen["launch_pdl"] == overlap


def silent(layer):
    """Channels that say nothing: rows that lie elsewhere hear what is not theirs."""
    made, near = LANES(layer)
    return Lanes(made.own * 0, made.between * 0, made.weight), near
