"""Keys that are rounded in turn (formats/feedback) by the write kernels, against the reference."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV
from quantpage.formats import (
    FORMATS,
    KeyMap,
    KVFormat,
    find_format,
    rotate,
)
from quantpage.ops.rope_write import QKNorm, WriteParams, triton_in_turn
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import rope_write
from quantpage.rope import rope_table
from tests.ops.rope_write.kernel_cases import (
    GROUP,
    KV_HEADS,
    NEAR_FP8,
    PAGE,
    copy_of,
    empty_pages,
    feedback_map,
    losses,
    run,
    same_codes,
    same_rows,
)
from tests.ops.triton_cases import DEVICE, GPU, TIER

pytestmark = TIER
IN_TURN = ["int8", "int6", "int4", "k8v4", "int8_static", "int4_static", "int4_near8", "k8v4_near8"]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *((name, 64) for name in IN_TURN), ("int3", 64), ("int4_near8", 80), ("int6", 80),
        ("int4", 128), ("k=fp8,v=int4_near8", 64),
        *([("int4", 256), ("int8", 256), ("int4_near8", 128), ("int8", 512)] if GPU else []),
    ],
)  # fmt: skip
def test_keys_that_are_rounded_in_turn(name, head_dim, few, monkeypatch):
    """The codes of the reference, but where one on a tie moved those that are rounded after it."""
    monkeypatch.setattr(triton_in_turn, "FEW_TOKENS", 256 if few else 0)
    torch.manual_seed(4)
    given, pages = find_format(name), 3
    key_map = feedback_map(head_dim, given.key.rotation == "hadamard")
    if not given.key.code.integer:
        # Pages in fp8 have no map with feedback; near ones beside a body in int8 have.
        given = replace(FORMATS["k8v4"], near=KVFormat("fp8", *[NEAR_FP8] * 2))
    tables = [list(range(pages))]
    near = tables if given.exact_pages is not None else None
    batch = plan_batch((40,), (45,), tables, PAGE, DEVICE, near)
    batch.slots[1] = -1
    halves = [empty_pages(spec, head_dim, pages) for spec in (given.key, given.value)]
    exact = (None, None)
    if given.near is not None:
        exact = [empty_pages(spec, head_dim, pages) for spec in (given.near.key, given.near.value)]
    elif near is not None:
        numbers = torch.full((pages, KV_HEADS, PAGE, head_dim), torch.nan, device=DEVICE).half()
        exact = (numbers, numbers.clone())
    layer = LayerKV(*halves, *exact, key_map)
    other = copy_of(layer)
    q = torch.randn(40, GROUP * KV_HEADS, head_dim, device=DEVICE)
    k, v = torch.randn(2, 40, KV_HEADS, head_dim, device=DEVICE)
    k = k + key_map.mean
    # A NaN, a row without any range, one whose losses overflow, and one that is nothing.
    k[3, 1, 2], k[4, 0], k[5, 1, 7], k[6] = torch.nan, key_map.mean[0], 1e30, 0.0
    params = WriteParams(return_rows=True)
    got = rope_write(q, k, v, layer, batch, params)
    wanted = reference(q, k, v, other, batch, params)
    torch.testing.assert_close(got.q, wanted.q, rtol=1e-3, atol=1e-3)
    same_codes(layer.value, other.value, 8)
    assert torch.equal(got.k_rows.isfinite(), wanted.k_rows.isfinite())
    assert same_rows(layer.key, other.key) > 0.97
    if given.near is not None:
        assert same_rows(layer.exact_key, other.exact_key) > 0.97
        same_codes(layer.exact_value, other.exact_value, 8)
    elif near is not None:
        torch.testing.assert_close(layer.exact_key, other.exact_key, rtol=2e-3, atol=2e-3,
                                   equal_nan=True)  # fmt: skip
    x = key_map.keys(k.nan_to_num(0.0))
    x = rotate(x) if given.key.rotation == "hadamard" else x
    rows = torch.arange(40, device=DEVICE) > 6
    mine, theirs = (losses(each.k_rows, x, key_map.feedback)[rows] for each in (got, wanted))
    torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(("name", "head_dim"), [("int8", 64), ("int4", 128), ("int3", 64)])
def test_rounding_in_turn_does_not_depend_on_the_cut(name, head_dim, monkeypatch):
    """A token's codes, written alone and among others, by either shape of the launch."""
    torch.manual_seed(6)
    spec, key_map = FORMATS[name].key, feedback_map(head_dim, True)
    k = torch.randn(40, KV_HEADS, head_dim, device=DEVICE).to(torch.float16)
    written = []
    for cuts, few in (((0, 40), 0), ((0, 1, 18, 40), 256)):
        monkeypatch.setattr(triton_in_turn, "FEW_TOKENS", few)
        layer = LayerKV(*(empty_pages(spec, head_dim, 3) for _ in "kv"), None, None, key_map)
        for start, stop in pairwise(cuts):
            batch = plan_batch((stop - start,), (stop,), [[0, 1, 2]], PAGE, DEVICE)
            rope_write(None, k[start:stop], k[start:stop], layer, batch, WriteParams())
        written.append(layer.key)
    assert same_rows(*written) == 1.0


@pytest.mark.parametrize("name", ["int8", "int4_near8"])
def test_keys_are_rounded_in_turn_behind_norms_and_rotations(name):
    torch.manual_seed(5)
    given = find_format(name)
    key_map = feedback_map(64, True, mean=False)
    weights = [torch.rand(64, device=DEVICE) + 0.5 for _ in range(2)]
    heads = (GROUP * KV_HEADS, KV_HEADS, KV_HEADS)
    bias = tuple(torch.randn(h, 64, device=DEVICE) for h in heads)
    # Two rows: a code next to a tie takes those along that are rounded after it.
    table = rope_table(64, 32, device=DEVICE)
    params = WriteParams(table, QKNorm(*weights), bias, return_rows=True)
    exact = given.exact_pages is not None
    run(given.key, given.value, params, exact=exact, near=given.near, key_map=key_map, allowed=130)


def test_other_blocks_in_turn_are_refused():
    spec = FORMATS["int8_static"].key
    key_map = KeyMap(
        torch.ones(KV_HEADS, 40, device=DEVICE), None, torch.eye(40, device=DEVICE).repeat(2, 1, 1)
    )
    layer = LayerKV(empty_pages(spec, 40), empty_pages(spec, 40), key_map=key_map)
    batch = plan_batch((4,), (4,), [[0]], PAGE, DEVICE)
    rows = torch.randn(4, KV_HEADS, 40, device=DEVICE)
    with pytest.raises(ValueError, match="multiple of 16 for a key map with feedback, got 40"):
        rope_write(None, rows, rows, layer, batch, WriteParams())
