"""The write kernel against the reference: codes, scales, queries and rows."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV
from quantpage.formats import (
    CODES,
    FORMATS,
    Granularity,
    KVFormat,
    QuantSpec,
    find_format,
)
from quantpage.ops.rope_write import QKNorm, WriteParams
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import Shape, rope_write
from quantpage.rope import rope_table
from tests.ops.rope_write.kernel_cases import (
    GROUP,
    KV_HEADS,
    PAGE,
    copy_of,
    empty_pages,
    random_map,
    run,
    same_codes,
)
from tests.ops.triton_cases import DEVICE, GPU, KERNEL_FORMATS, NEAR_FORMATS, TIER

pytestmark = TIER


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_every_format(name):
    given = FORMATS[name]
    table = rope_table(64, 64, device=DEVICE)
    params = WriteParams(rope=table, return_rows=True)
    run(given.key, given.value, params, exact=given.exact_pages is not None)


_GROUPED = QuantSpec(CODES["int8"], Granularity(group=32), rotation="hadamard")


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(
    "given",
    [*NEAR_FORMATS, replace(find_format("int4_near8"), near=KVFormat("g", _GROUPED, _GROUPED))],
    ids=["int4_near8", "k8v4_near8", "k=fp8,v=int4_near8", "scales of groups"],
)
def test_near_pages_that_are_codes(given, head_dim):
    """Some of the rows have a place there, and those of the body beside it."""
    if head_dim == 80 and given.near.key.granularity.group:
        pytest.skip("groups of 32 channels do not divide 80")
    table = rope_table(64, head_dim, device=DEVICE)
    params = WriteParams(table, return_rows=True)
    for queries in ((5, 1, 3), (0, 2, 0)):
        layer = run(given.key, given.value, params, head_dim, queries, exact=True, near=given.near,
                    key_map=random_map(head_dim), allowed=8)  # fmt: skip
        written = ~layer.exact_key.scale[..., 0].isnan()
        assert written.sum() == (sum(queries) - 1 + 1) * KV_HEADS


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize(
    "rotary,interleaved", [(None, False), (None, True), (32, False), (16, True)]
)
def test_rotations(head_dim, rotary, interleaved):
    table = rope_table(64, rotary or head_dim, interleaved=interleaved, device=DEVICE)
    given = FORMATS["int8"]
    run(given.key, given.value, WriteParams(rope=table), head_dim)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["none", "int8"])
def test_norms_and_biases(name, after):
    torch.manual_seed(1)
    weights = [torch.rand(64, device=DEVICE).half() + 0.5 for _ in range(2)]
    # float32 biases: the reference adds in the wider dtype, as the kernel does.
    heads = (GROUP * KV_HEADS, KV_HEADS, KV_HEADS)
    bias = tuple(torch.randn(h, 64, device=DEVICE) for h in heads)
    given = FORMATS[name]
    params = WriteParams(
        rope_table(64, 64, device=DEVICE), QKNorm(*weights, after_rope=after), bias,
        return_rows=True,
    )  # fmt: skip
    run(given.key, given.value, params, allowed=8)


@pytest.mark.parametrize(
    ("head_dim", "rotary", "mean"),
    [
        (64, 64, True), (64, 64, False), (80, None, True), (128, 32, False), (256, 256, True),
        (512, 512, True),
        # An interpreter sees each of them, not every pair.
        *([(80, None, False), (128, 32, True), (256, 256, False)] if GPU else []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "int6", "int3"])
def test_key_maps(name, head_dim, rotary, mean):
    torch.manual_seed(2)
    table = None if rotary is None else rope_table(64, rotary, device=DEVICE)
    weights = [torch.rand(head_dim, device=DEVICE).half() + 0.5 for _ in range(2)]
    norm = QKNorm(*weights, after_rope=True) if head_dim >= 256 else None
    given = FORMATS[name]
    mapped = random_map(head_dim, mean)

    def biased(fused):
        # Keys near their mean, as a bias makes them, rounded to the rows' dtype.
        at = GROUP * KV_HEADS * head_dim
        if mean and norm is None and table is None:
            fused[:, at : at + KV_HEADS * head_dim] += mapped.mean.flatten()

    run(given.key, given.value, WriteParams(table, norm, return_rows=True), head_dim,
        exact=given.exact_pages is not None, change=biased, key_map=mapped, allowed=8)  # fmt: skip


def test_groups_of_channels():
    spec = QuantSpec(CODES["int4"], Granularity(group=16), zero_point=True)
    run(spec, spec, WriteParams(return_rows=True), head_dim=80)
    run(QuantSpec(CODES["int8"], Granularity(group=32)), spec, WriteParams())
    planes = QuantSpec(CODES["int6"], Granularity(group=16), zero_point=True)
    run(planes, replace(planes, code=CODES["int3"]), WriteParams(return_rows=True), head_dim=80)
    run(replace(planes, code=CODES["int3"]), planes, WriteParams())


@pytest.mark.parametrize("code", ["int6", "int3"])
@pytest.mark.parametrize("zero", [False, True])
def test_planes_of_given_scales(code, zero):
    spec = QuantSpec(CODES[code], Granularity(group=1), dynamic=False, zero_point=zero)
    run(spec, QuantSpec(CODES[code], dynamic=False, zero_point=zero), WriteParams(), head_dim=96)


@pytest.mark.parametrize("name", ["int8", "int4", "int6", "int3"])
@pytest.mark.parametrize(
    "head_dim,shape",
    [
        (128, Shape(4, 1, 2, 16, 1)),
        (64, Shape(8, 1, 1, 64, 2)),
        (128, Shape(2, 2, 3, 128, 1, heads_first=True)),
        (128, Shape(8, 2, 2, 32, 1, heads_first=True)),
    ],
)
def test_pieces_of_every_size(name, head_dim, shape):
    given = FORMATS[name]
    params = WriteParams(rope_table(64, head_dim, device=DEVICE), return_rows=True)
    run(given.key, given.value, params, head_dim, shape=shape, allowed=8)


def test_without_queries_or_rotation():
    given = FORMATS["fp8"]
    run(given.key, given.value, WriteParams(), q=False)


@pytest.mark.parametrize("tokens", [7, 150])
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "k8v4"])
def test_latent_rows(name, tokens):
    """A row of 512 channels, 64 rotary ones, each with scales of its own; no second row."""
    torch.manual_seed(0)
    given, rank, rotary = FORMATS[name], 512, 64
    pages = -(-tokens // PAGE)
    tables = [list(range(pages))]
    near = tables if given.exact_pages is not None else None
    batch = plan_batch((tokens,), (tokens,), tables, PAGE, DEVICE, near)
    batch.slots[1] = -1
    halves = (empty_pages(given.key, rank, pages, 1), empty_pages(given.value, rotary, pages, 1))
    layer = LayerKV(*halves, latent=True)
    if near is not None:
        exact = [
            torch.full((pages, 1, PAGE, w), torch.nan, device=DEVICE).half() for w in (rank, rotary)
        ]
        layer = replace(layer, exact_key=exact[0], exact_value=exact[1])
    other = replace(copy_of(layer), latent=True)
    # One projection makes both: rows are strided.
    k, v = torch.randn(tokens, 1, rank + rotary, device=DEVICE).half().split([rank, rotary], -1)
    q = torch.randn(tokens, 6, rank + rotary, device=DEVICE).half()
    params = WriteParams(return_rows=True)
    wanted = reference(q, k, v, other, batch, params)
    got = rope_write(q, k, v, layer, batch, params)
    same_codes(layer.key, other.key, tokens)
    same_codes(layer.value, other.value, tokens)
    if near is not None:
        for half in ("exact_key", "exact_value"):
            one, two = getattr(layer, half), getattr(other, half)
            torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3, equal_nan=True)
    torch.testing.assert_close(got.q, wanted.q)
    for one, two in ((got.k_rows, wanted.k_rows), (got.v_rows, wanted.v_rows)):
        off = (one.float() - two.float()).abs() > 4e-3 * two.float().abs() + 4e-3
        assert off.sum() <= tokens


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_hostile_rows_stay_inside(name):
    def hostile(fused):
        fused[0] = 0.0
        fused[2, ::7] = torch.inf
        fused[3, ::5] = torch.nan
        fused[4] = 1e-7
        fused[5] = 3.0

    spec = replace(FORMATS[name].key, rotation="none")
    run(spec, spec, WriteParams(return_rows=True), change=hostile)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("name", ["int4", "k8v4", "int8_exact"])
def test_exact_pages_are_finite(name, rotation):
    def hostile(fused):
        if rotation == "none":
            # Of sums of infinities the order of adding decides which are NaN.
            fused[2, ::7] = torch.inf
        fused[3, ::5] = torch.nan
        # Rotated they exceed float16.
        fused[5] = 50000.0 + torch.randn(fused.shape[1], device=DEVICE) * 1000

    key, value = (
        replace(spec, rotation=rotation) for spec in (FORMATS[name].key, FORMATS[name].value)
    )
    layer = run(key, value, WriteParams(), change=hostile, exact=True, allowed=64)
    for pages in (layer.exact_key, layer.exact_value):
        rows = pages.transpose(1, 2).flatten(0, 1).flatten(1)
        written = rows[~rows.isnan().all(1)]
        assert written.shape[0] == 9
        assert (written.abs() == 65504).any() and written.isfinite().all()


def test_unquantized_pages_keep_what_they_are_given():
    def hostile(fused):
        fused[2] = torch.inf
        fused[3] = torch.nan

    spec = FORMATS["none"].key
    layer = run(spec, spec, WriteParams(), change=hostile)
    assert layer.key.codes.isinf().any() and layer.value.codes.isinf().any()


def test_fp8_rounds_ties_to_even():
    """Every number half way between two codes, beside a 448 for a scale of 1."""
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    wanted = codes[:-1] + codes[:-1] % 2
    rows = torch.full((4, 64), 448.0)
    expected = torch.full((4, 64), 0x7E, dtype=torch.uint8)
    for at, sign in ((0, 1), (2, -1)):
        rows[at : at + 2, :63] = sign * ties.view(2, 63)
        expected[at : at + 2, :63] = wanted.view(2, 63) | (0 if sign > 0 else 128)
    spec = QuantSpec(CODES["fp8"])
    batch = plan_batch((4,), (4,), [[0]], PAGE, DEVICE)
    given = rows[:, None].expand(4, KV_HEADS, 64).half().to(DEVICE)
    layer = LayerKV(empty_pages(spec, 64), empty_pages(spec, 64))
    other = copy_of(layer)
    for write, pages in ((rope_write, layer), (reference, other)):
        write(None, given, given, pages, batch, WriteParams())
        for half in (pages.key, pages.value):
            assert (half.scale[0, :, :4] == 1).all()
            found = half.codes.view(torch.uint8)[0, :, :4].cpu()
            assert torch.equal(found, expected.expand(KV_HEADS, 4, 64))


def test_checked_mode_refuses():
    from quantpage.errors import NonFiniteInput

    def hostile(fused):
        fused[3, -1] = torch.nan

    given = FORMATS["int8"]
    with pytest.raises(NonFiniteInput, match="token 3"):
        run(given.key, given.value, WriteParams(checked=True), change=hostile)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int6", "int3"])
@pytest.mark.parametrize("tokens", [1, 64, 700, 5000])
@pytest.mark.parametrize("returned", [True, False])
def test_many_tokens(tokens, name, returned):
    torch.manual_seed(0)
    given = FORMATS[name]
    pages = -(-tokens // PAGE)
    batch = plan_batch((tokens,), (tokens,), [list(range(pages))], PAGE, DEVICE)
    layer = LayerKV(*[empty_pages(given.key, 128, pages) for _ in range(2)])
    other = copy_of(layer)
    q = torch.randn(tokens, GROUP * KV_HEADS, 128, device=DEVICE).bfloat16()
    k, v = (torch.randn(tokens, KV_HEADS, 128, device=DEVICE).bfloat16() for _ in range(2))
    params = WriteParams(rope_table(tokens, 128, device=DEVICE), return_rows=returned)
    got = rope_write(q, k, v, layer, batch, params)
    wanted = reference(q, k, v, other, batch, params)
    same_codes(layer.key, other.key, tokens)
    same_codes(layer.value, other.value, tokens)
    for one, two in zip(got, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is None:
            continue
        off = (one.float() - two.float()).abs() > 2e-2 * two.float().abs() + 5e-2
        assert off.sum() <= tokens


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "int8", "int4", "int6"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("head_dim,biased", [(64, False), (128, False), (128, True), (256, False)])
def test_tiles_of_heads(head_dim, biased, mapped, name, dtype):
    """Eight heads a tile: queries are turned and rotated by tensor cores. 24 are a tile too few."""
    torch.manual_seed(0)
    tokens, heads = 500, (24, 8, 8)
    spec = FORMATS[name].key
    batch = plan_batch((tokens,), (tokens,), [list(range(32))], PAGE, DEVICE)
    given = [torch.randn(tokens, h, head_dim, device=DEVICE).to(dtype) for h in heads]
    bias = tuple(torch.randn(h, head_dim, device=DEVICE).to(dtype) for h in heads)
    pages = [empty_pages(spec, head_dim, 32, 8) for _ in range(2)]
    key_map = random_map(head_dim, heads=8) if mapped else None
    layer = LayerKV(*pages, key_map=key_map)
    other = copy_of(layer)
    params = WriteParams(rope_table(tokens, head_dim, device=DEVICE), bias=bias if biased else None)
    # The reference adds in the dtype of the rows.
    wide = [t.float() for t in given] if biased else given
    wanted = reference(*wide, other, batch, params)
    got = rope_write(*given, layer, batch, params)
    same_codes(layer.key, other.key, tokens)
    same_codes(layer.value, other.value, tokens)
    off = (got.q.float() - wanted.q.float()).abs() > 2e-2 * wanted.q.float().abs() + 2e-2
    assert off.sum() == 0
