"""The matrices of a key map in the launch before a write's, against the map itself."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV
from quantpage.formats import FORMATS, KeyMap, find_format, rotate
from quantpage.formats.feedback import with_feedback
from quantpage.ops.rope_write import QKNorm, WriteParams
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import rope_write
from quantpage.ops.rope_write.triton_turn import turned_before
from quantpage.rope import rope_table
from tests.ops.rope_write.kernel_cases import (
    GROUP,
    KV_HEADS,
    PAGE,
    copy_of,
    empty_pages,
    random_map,
    same_codes,
    same_rows,
)
from tests.ops.triton_cases import DEVICE, GPU, TIER

pytestmark = TIER


def turned_map(head_dim, mean=True):
    noise = torch.Generator().manual_seed(3)
    apart = torch.randn(KV_HEADS, head_dim, head_dim, generator=noise) * 0.3 / head_dim**0.5
    scales = random_map(head_dim, mean)
    return replace(scales, turn=(torch.eye(head_dim) + apart).to(DEVICE))


def step(tokens, head_dim, dtype=torch.float32):
    """Q, K and V of one projection, so that rows are strided, and the plan of one request."""
    torch.manual_seed(1)
    heads = GROUP * KV_HEADS, KV_HEADS, KV_HEADS
    fused = torch.randn(tokens, sum(heads) * head_dim, device=DEVICE).to(dtype)
    pages = -(-(tokens + 5) // PAGE)
    batch = plan_batch((tokens,), (tokens + 5,), [list(range(pages))], PAGE, DEVICE)
    return fused.unflatten(1, (-1, head_dim)).split(heads, 1), batch, pages


@pytest.mark.parametrize(
    ("tokens", "head_dim", "mean"),
    [(3, 64, True), (40, 80, False), (300, 64, True), *([(70, 128, True), (17, 256, True)] * GPU)],
)
def test_rows_are_those_of_the_map(tokens, head_dim, mean):
    (q, k, v), batch, pages = step(tokens, head_dim)
    given, mapped = FORMATS["int4"], turned_map(head_dim, mean)
    halves = [empty_pages(spec, head_dim, pages) for spec in (given.key, given.value)]
    layer = LayerKV(*halves, key_map=mapped)
    made = turned_before(q, k, v, layer, batch, WriteParams())
    torch.testing.assert_close(made.q, rotate(mapped.queries(q)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.k, mapped.keys(k), rtol=1e-4, atol=1e-3)
    assert made.layer.key_map.turn is None
    alone = turned_before(None, k, v, layer, batch, WriteParams())
    assert alone.q is None
    assert torch.equal(alone.k, made.k)


@pytest.mark.parametrize("name", ["int4", "int6"])
def test_pages_are_those_of_the_reference(name):
    """Behind biases, norms and rotations, in float32: codes in turn and by themselves."""
    (q, k, v), batch, pages = step(40, 64)
    given = find_format(name)
    batch.slots[1] = -1
    width = [x.shape[1:] for x in (q, k, v)]
    norm = QKNorm(*(torch.rand(2, 64, device=DEVICE) + 0.5))
    bias = tuple(torch.randn(each, device=DEVICE) for each in width)
    params = WriteParams(rope_table(64, 64, device=DEVICE), norm, bias=bias, return_rows=True)
    directions = torch.randn(KV_HEADS, 64, 24, device=DEVICE)
    metric = directions @ directions.mT + 0.1 * torch.eye(64, device=DEVICE)
    for mapped in (turned_map(64), with_feedback(turned_map(64), metric, True)):
        halves = [empty_pages(spec, 64, pages) for spec in (given.key, given.value)]
        layer = LayerKV(*halves, key_map=mapped)
        other = copy_of(layer)
        got = rope_write(q, k, v, layer, batch, params)
        wanted = reference(q, k, v, other, batch, params)
        torch.testing.assert_close(got.q, wanted.q, rtol=1e-3, atol=1e-3)
        if mapped.feedback is None:
            same_codes(layer.key, other.key, 8)
        else:
            # A product summed in another order moves more numbers over ties than scales do.
            assert same_rows(layer.key, other.key) > 0.9
        same_codes(layer.value, other.value, 8)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        (20, 64, torch.float16), (300, 80, torch.float16),
        *([(200, 128, torch.bfloat16), (400, 128, torch.float16), (9, 256, torch.bfloat16)] * GPU),
    ],
)  # fmt: skip
def test_rows_of_16_bits_are_as_near_as_those_are(tokens, head_dim, dtype):
    """Rounded where they are made; neither what they are about nor the matrix is."""
    (q, k, v), batch, pages = step(tokens, head_dim, dtype)
    given, mapped = FORMATS["int4"], turned_map(head_dim)
    halves = [empty_pages(spec, head_dim, pages) for spec in (given.key, given.value)]
    layer = LayerKV(*halves, key_map=mapped)
    made = turned_before(q, k, v, layer, batch, WriteParams())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        made.q.float(), rotate(mapped.queries(q)), rtol=0.6 * rounding, atol=2e-4 * rounding**0.5
    )
    torch.testing.assert_close(
        made.k.float(), mapped.keys(k), rtol=0.6 * rounding, atol=1e-2 * rounding**0.5
    )


@pytest.mark.skipif(not GPU, reason="sums of an interpreted product depend on where a row is")
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_rows_do_not_depend_on_how_a_step_is_cut(head_dim, dtype):
    rows, batch, pages = step(4096, head_dim, dtype)
    halves = [empty_pages(FORMATS["int4"].key, head_dim, pages) for _ in range(2)]
    layer = LayerKV(*halves, key_map=turned_map(head_dim))
    whole = turned_before(*rows, layer, batch, WriteParams())
    for start, end in ((0, 64), (77, 78), (3290, 3590)):
        part = turned_before(*(x[start:end] for x in rows), layer, batch, WriteParams())
        assert torch.equal(part.q, whole.q[start:end])
        assert torch.equal(part.k, whole.k[start:end])


def test_a_map_without_a_matrix_takes_no_launch_of_its_own(monkeypatch):
    (q, k, v), batch, pages = step(3, 64)
    given = FORMATS["int6"]
    halves = [empty_pages(spec, 64, pages) for spec in (given.key, given.value)]
    monkeypatch.setattr("quantpage.ops.rope_write.triton.turned_before", None)
    rope_write(
        q, k, v, LayerKV(*halves, key_map=KeyMap(random_map(64).scale)), batch, WriteParams()
    )
