"""The write kernel against the reference: codes, scales, queries and rows."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import (
    CODES,
    FORMATS,
    Granularity,
    KeyMap,
    KVFormat,
    QuantSpec,
    find_format,
    rotate,
)
from quantpage.formats.feedback import with_feedback
from quantpage.formats.quantize import unpack
from quantpage.ops.rope_write import QKNorm, WriteParams, triton_in_turn
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import Shape, rope_write
from quantpage.rope import rope_table
from tests.ops.triton_cases import DEVICE, GPU, KERNEL_FORMATS, NEAR_FORMATS, TIER

pytestmark = TIER
KV_HEADS, GROUP, PAGE = 2, 3, 16
SMALL = Shape(4, 2, 2, 32, 1)


def empty_pages(spec, width, pages=8, heads=KV_HEADS):
    """Pages full of what nobody wrote."""
    if not spec.quantized:
        full = torch.full((pages, heads, PAGE, width), torch.nan, dtype=torch.float16)
        return QuantizedPages(spec, full.to(DEVICE))
    codes = torch.full(
        (pages, heads, PAGE, spec.code.stored(width)), 0x7F, dtype=torch.uint8, device=DEVICE
    )
    codes = codes.view(spec.code.storage)
    groups = spec.granularity.groups(width)
    if spec.dynamic:
        scale = torch.full((pages, heads, PAGE, groups), torch.nan, dtype=spec.scale_dtype)
        zero = scale.clone()
    else:
        shape = spec.granularity.scale_shape(heads, width)
        scale = ((torch.rand(shape) + 0.5) * 4 / spec.code.qmax).to(spec.scale_dtype)
        zero = (torch.randn(shape) * 0.1).to(spec.scale_dtype)
    zero = zero.to(DEVICE) if spec.zero_point else None
    return QuantizedPages(spec, codes, scale.to(DEVICE), zero)


def copy_of(layer):
    def own(pages):
        planes = [None if p is None else p.clone() for p in (pages.scale, pages.zero)]
        return QuantizedPages(pages.spec, pages.codes.clone(), *planes)

    exact = [
        own(p) if isinstance(p, QuantizedPages) else None if p is None else p.clone()
        for p in (layer.exact_key, layer.exact_value)
    ]
    return LayerKV(own(layer.key), own(layer.value), *exact, layer.key_map)


def same_codes(got, wanted, allowed):
    """Equal, but for a few neighbours: sums in another order move a number over a rounding tie.

    A scale may be such a number, seldom: its row's codes are then those of the neighbouring scale.
    """
    a, b = got.codes, wanted.codes
    if got.spec.quantized:
        a, b = unpack(a, got.spec.code), unpack(b, got.spec.code)
        differ = a.view(torch.uint8) != b.view(torch.uint8)
        if got.spec.dynamic:
            moved = (got.scale != wanted.scale) & ~wanted.scale.isnan()
            moved = moved.any(-1)
            assert moved.sum() <= max(1, moved.numel() // 200)
            differ = differ & ~moved[..., None]
        assert differ.sum() <= allowed
    else:
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True)
    if got.scale is not None:
        torch.testing.assert_close(got.scale, wanted.scale, rtol=2e-3, atol=2e-3, equal_nan=True)
    if got.zero is not None:
        # It is low + 8 scales (int6: 32): a neighbouring scale moves it by as many of its float16
        # steps.
        steps = -wanted.spec.code.qmin
        one, two, scale = got.zero.double(), wanted.zero.double(), wanted.scale.double()
        off = (one - two).abs() - 2e-3 * two.abs() - 2e-3 - steps * 2**-10 * scale.abs()
        assert not (off > 0).any()
        assert torch.equal(one.isnan(), two.isnan())


def random_map(head_dim, mean=True, heads=KV_HEADS):
    scale = torch.rand(heads, head_dim, device=DEVICE) * 3 + 0.05
    scale[:, ::3] *= -1
    return KeyMap(scale, torch.randn(heads, head_dim, device=DEVICE) * 30 if mean else None)


def run(key, value, params, head_dim=64, queries=(5, 1, 3), exact=False, q=True, change=None,
        allowed=4, shape=None, key_map=None, near=None):  # fmt: skip
    """near: the format of exact pages that are codes; None: they are numbers."""
    torch.manual_seed(0)
    contexts = tuple(n + 9 for n in queries)
    tables = [[3, 1], [0, 6], [5, 2]]
    exact_tables = [[0, 1], [2, 3], [4, 5]] if exact else None
    batch = plan_batch(queries, contexts, tables, PAGE, DEVICE, exact_tables)
    batch.slots[1] = -1
    tokens = sum(queries)
    # Q, K and V of one projection: rows are strided.
    width = (GROUP * KV_HEADS + 2 * KV_HEADS) * head_dim
    fused = torch.randn(tokens, width, device=DEVICE).half()
    if change is not None:
        change(fused)
    parts = fused.unflatten(1, (-1, head_dim)).split((GROUP * KV_HEADS, KV_HEADS, KV_HEADS), 1)
    layer = LayerKV(empty_pages(key, head_dim), empty_pages(value, head_dim), key_map=key_map)
    if near is not None:
        kept = [empty_pages(spec, head_dim, 6) for spec in (near.key, near.value)]
        layer = replace(layer, exact_key=kept[0], exact_value=kept[1])
    elif exact:
        pages = torch.full((6, KV_HEADS, PAGE, head_dim), torch.nan, device=DEVICE).half()
        layer = replace(layer, exact_key=pages, exact_value=pages.clone())
    other = copy_of(layer)
    given = (parts[0] if q else None, parts[1], parts[2])
    wanted = reference(*given, other, batch, params)
    got = rope_write(*given, layer, batch, params, shape=shape or (None if GPU else SMALL))
    same_codes(layer.key, other.key, allowed)
    same_codes(layer.value, other.value, allowed)
    for one, two in ((layer.exact_key, other.exact_key), (layer.exact_value, other.exact_value)):
        if near is not None:
            same_codes(one, two, allowed)
        elif exact:
            torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3, equal_nan=True)
    for one, two in zip(got, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            # One code's step where a tie fell the other way.
            off = (one.float() - two.float()).abs() > 4e-3 * two.float().abs() + 4e-3
            assert off.sum() <= allowed
    return layer


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_every_format(name):
    given = FORMATS[name]
    table = rope_table(64, 64, device=DEVICE)
    params = WriteParams(rope=table, return_rows=True)
    run(given.key, given.value, params, exact=given.exact_pages is not None)


NEAR_FP8 = replace(FORMATS["fp8"].key, rotation="hadamard")
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


def feedback_map(head_dim, rotated, mean=True):
    """A map by a metric of a few directions, as queries have them."""
    noise = torch.Generator().manual_seed(9)
    metric = torch.randn(KV_HEADS, head_dim, 24, generator=noise)
    metric = (metric @ metric.mT + 0.1 * torch.eye(head_dim)).to(DEVICE)
    return with_feedback(random_map(head_dim, mean), metric, rotated)


def losses(rows, x, feedback):
    """What rows [tokens, kv_heads, head_dim] cost in the metric, beside the true ones."""
    lower = feedback.tril(-1) + torch.eye(feedback.shape[-1], device=feedback.device)
    off = torch.einsum("thj,hji->thi", rows - x, lower)
    return (off.square() * feedback.diagonal(dim1=1, dim2=2)).sum(-1)


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


def same_rows(got, wanted) -> float:
    """Share of slots and heads that hold the same codes and scales."""
    same = (got.codes.view(torch.uint8) == wanted.codes.view(torch.uint8)).all(-1)
    if got.spec.dynamic:
        for one, two in ((got.scale, wanted.scale), (got.zero, wanted.zero)):
            if one is not None:
                same &= ((one == two) | (one.isnan() & two.isnan())).all(-1)
    return float(same.double().mean())


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
