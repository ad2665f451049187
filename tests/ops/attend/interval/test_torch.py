"""Interval masks through the torch path: equal to the oracle, to themselves in chunks, and fewer
tiles than pairs.
"""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage import masks
from quantpage.explain import example_call
from quantpage.formats import FORMATS
from quantpage.hardware import DeviceInfo, device_info
from quantpage.masks import RowIntervals
from quantpage.ops.attend import CANDIDATES, AttendParams, attend, reference, torch_blockwise
from quantpage.ops.dispatch import Implementation
from tests.masks.drawn import Strided, any_mask, every_kind
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu

TORCH = Implementation("torch", "quantpage.ops.attend.torch_blockwise:attend", lambda call: [])
KINDS = sorted(every_kind(24))


def small_tiles(query=16, key=32):
    return patch.multiple(torch_blockwise, QUERY_TILE=query, KEY_TILE=key)


def check(case, mask, chunks, sinks=None, softcap=None):
    q, batch = case.step(chunks)
    params = AttendParams(case.layer.key.head_dim**-0.5, mask, softcap, sinks)
    with small_tiles():
        out, lse = attend(q.float(), case.layer, batch, params, TORCH)
    wanted, wanted_lse = reference.attend(q, case.layer, batch, params)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)
    return out, lse, wanted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_equals_the_oracle(data):
    contexts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=2))
    heads = data.draw(st.sampled_from([1, 2]))
    mask = data.draw(any_mask(max(contexts), batch=len(contexts), heads=heads))
    case = cached(
        data.draw(st.sampled_from(sorted(FORMATS))),
        contexts,
        page_size=data.draw(st.sampled_from([16, 32])),
        seed=data.draw(st.integers(0, 99)),
    )
    chunks = []
    for context in contexts:
        end = data.draw(st.integers(1, context))
        chunks.append((data.draw(st.integers(0, end)), end))
    check(case, mask, chunks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_whole_is_chunked_is_after_a_prefix_hit(kind, name):
    tokens, after = 45, 3
    mask = every_kind(tokens)[kind]
    case = cached(name, [tokens + after], dtype=torch.float64)
    params = AttendParams(0.2, mask)

    def run(chunks):
        with small_tiles(8):
            rows = [attend(*_step(case, c), params, TORCH) for c in chunks]
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])

    whole = run([(0, tokens), (tokens, tokens + after)])
    wanted, _ = reference.attend(*_step(case, (0, tokens)), params)
    torch.testing.assert_close(whole[0][:tokens], wanted, atol=1e-12, rtol=1e-9)
    cuts = [0]
    while cuts[-1] < tokens:
        cuts.append(mask.next_cut(cuts[-1] + 7, tokens))
    chunked = run(
        [
            *pairwise(cuts),
            *((t, t + 1) for t in range(tokens, tokens + after)),
        ]
    )
    # A hit: the first chunks were computed by someone else, only the rest is asked for.
    hit = run([(cuts[len(cuts) // 2], tokens), (tokens, tokens + after)])
    for mine, theirs in zip(whole, chunked, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)
    for mine, theirs in zip(whole, hit, strict=True):
        torch.testing.assert_close(mine[-len(theirs) :], theirs, atol=1e-12, rtol=1e-9)


def _step(case, chunk):
    q, batch = case.step([chunk])
    return q, case.layer, batch


def test_fully_masked_rows_are_zero_and_minus_infinity():
    case = cached("int8", [37])
    ranges = torch.zeros(1, 1, 37, 1, 2, dtype=torch.int32)
    ranges[0, 0, ::3, 0] = torch.tensor([5, 21], dtype=torch.int32)
    out, lse, _ = check(case, RowIntervals(ranges), [(0, 37)])
    hidden = torch.arange(37) % 3 != 0
    assert (out[hidden] == 0).all() and lse[hidden].isneginf().all()
    assert out[~hidden].abs().amax(-1).min() > 0


def test_sinks_and_softcap_under_a_mask():
    case = cached("fp8", [29, 18])
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    check(case, masks.prefix_lm(29, 9), [(0, 29), (5, 18)], sinks=sinks, softcap=4.0)


def test_empty_tiles_are_not_read_and_full_ones_not_masked():
    documents = masks.causal_document([64] * 4)
    case = cached("int8", [256])
    q, batch = case.step([(0, 256)])
    reads, masked = [], []
    rows, visible = torch_blockwise._rows, torch_blockwise._visible

    def count_rows(*args):
        reads.append(args)
        return rows(*args)

    def count_masks(*args):
        masked.append(args)
        return visible(*args)

    with (
        small_tiles(16, 16),
        patch.object(torch_blockwise, "_rows", count_rows),
        patch.object(torch_blockwise, "_visible", count_masks),
    ):
        torch_blockwise.attend(q.float(), case.layer, batch, AttendParams(1.0, documents))
    # 16 query tiles of 16; within a document tile i visits i + 1 tiles, K and V of each.
    assert len(reads) == 2 * 4 * (1 + 2 + 3 + 4)
    # Only the diagonal is masked.
    assert len(masked) == 16
    picture = documents.draw(256, tile=(16, 16)).counts()
    assert (picture["full"] + picture["partial"]) * 2 == len(reads)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("chunk", [(0, 70), (31, 70), (69, 70)])
def test_a_mask_without_a_form_is_asked(name, chunk):
    """By every implementation here; GPU kernels, which read intervals, refuse it by its kind."""
    case = cached(name, [70], dtype=torch.float32)
    q, batch = case.step([chunk])
    params = AttendParams(0.2, Strided(4, 16))
    wanted, wanted_lse = reference.attend(q, case.layer, batch, params)
    call = replace(example_call(device_info("cpu"), FORMATS[name], "asked"), head_dim=32,
                   value_head_dim=32, page_size=16, dtype=torch.float32)  # fmt: skip
    served = [each for each in CANDIDATES if not each.refusals(call)]
    assert {"torch"} <= {each.name for each in served} <= {"torch", "cpu"}
    for each in served:
        out, lse = attend(q, case.layer, batch, params, each, model_basis=False)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)
    gpu = replace(call, device=DeviceInfo("cuda", "a GPU", (9, 0), 132), dtype=torch.bfloat16)
    assert [each.name for each in CANDIDATES if not each.refusals(gpu)] == ["torch"]
