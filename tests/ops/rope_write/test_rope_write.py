"""What ends up in the pages, for every implementation that runs on this CPU."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, LayerKV, PagedKVCache
from quantpage.errors import NonFiniteInput
from quantpage.formats import FORMATS, KeyMap, dequantize, quantize, rotate
from quantpage.formats.feedback import with_feedback
from quantpage.hardware import device_info
from quantpage.ops.dispatch import Call
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.rope_write import CANDIDATES, QKNorm, WriteParams, reference
from quantpage.rope import apply_rope, rope_table
from tests.tolerances import rounding_error, same_save_ties

pytestmark = pytest.mark.cpu

IMPLEMENTATIONS = [each for each in CANDIDATES if each.name != "triton"]
DYNAMIC = [name for name, each in FORMATS.items() if each.dynamic]
KV_HEADS, Q_HEADS, PAGE = 2, 6, 16


@pytest.fixture(params=IMPLEMENTATIONS, ids=[each.name for each in IMPLEMENTATIONS])
def implementation(request):
    return request.param


def call_of(name, head_dim):
    return Call(
        device=device_info("cpu"),
        format=FORMATS[name],
        dtype=torch.float32,
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        value_head_dim=head_dim,
        page_size=PAGE,
    )


def write_of(implementation, name, head_dim):
    reasons = implementation.refusals(call_of(name, head_dim))
    if reasons:
        pytest.skip(" ".join(reasons))
    return implementation.load()


def empty_layer(name, head_dim=64, pages=12) -> LayerKV:
    cache = PagedKVCache(pages, pages)
    cache.add_layer(0, CacheLayout(KV_HEADS, head_dim, FORMATS[name], PAGE, torch.float32))
    return cache.layer(0)


def step(exact: bool, lengths=(20, 1, 9), contexts=(20, 30, 40)):
    tables = [[3, 1], [0, 5], [7, 2, 9]]
    return plan_batch(lengths, contexts, tables, PAGE, exact_tables=tables if exact else None)


def inputs(tokens, head_dim=64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, Q_HEADS, head_dim, generator=noise),
        torch.randn(tokens, KV_HEADS, head_dim, generator=noise),
        torch.randn(tokens, KV_HEADS, head_dim, generator=noise),
    )


def random_map(head_dim, mean=True):
    """Scales far apart and of either sign, means of a hundred times a key, as a projection's bias
    makes them."""
    noise = torch.Generator().manual_seed(5)
    scale = torch.rand(KV_HEADS, head_dim, generator=noise) * 3 + 0.05
    scale[:, ::3] *= -1
    means = torch.randn(KV_HEADS, head_dim, generator=noise) * 100
    return KeyMap(scale, means if mean else None)


def same_pages(got: LayerKV, wanted: LayerKV):
    for mine, theirs in ((got.key, wanted.key), (got.value, wanted.value)):
        if not mine.spec.quantized:
            torch.testing.assert_close(mine.codes, theirs.codes, atol=2e-6, rtol=2e-6)
            continue
        a, b = (dequantize(x.codes, x.scale, x.zero, x.spec, torch.float64) for x in (mine, theirs))
        same_save_ties(a, b, theirs.spec)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("name", DYNAMIC)
def test_pages_hold_what_the_reference_quantizer_makes(implementation, name, head_dim):
    write = write_of(implementation, name, head_dim)
    kv_format, batch = FORMATS[name], step(FORMATS[name].exact_pages is not None)
    layer = empty_layer(name, head_dim)
    q, k, v = inputs(30, head_dim)
    written = write(q, k, v, layer, batch, WriteParams(return_rows=True))
    turn = {"hadamard": rotate, "none": lambda x: x}
    for rows, spec, pages in (
        (k, kv_format.key, layer.key),
        (v, kv_format.value, layer.value),
    ):
        wanted = dequantize(*quantize(turn[spec.rotation](rows), spec), spec)
        held = gather_request(pages, batch.page_table[0], 20, torch.float32)
        same_save_ties(held, wanted[:20], spec)
    torch.testing.assert_close(written.q, turn[kv_format.key.rotation](q), atol=2e-6, rtol=2e-6)
    held = gather_request(layer.key, batch.page_table[0], 20, torch.float32)
    torch.testing.assert_close(written.k_rows[:20], held, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("after_rope", [False, True])
@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_bias_norm_and_rope(implementation, name, after_rope, interleaved):
    write = write_of(implementation, name, 64)
    exact = FORMATS[name].exact_pages is not None
    q, k, v = inputs(30)
    # Rows of a packed projection: strided, not contiguous.
    packed = torch.cat([q, k, v], dim=1)
    q, k, v = packed.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
    params = WriteParams(
        rope=rope_table(64, 32, interleaved=interleaved),
        norm=QKNorm(torch.rand(64) + 0.5, torch.rand(64) + 0.5, after_rope=after_rope),
        bias=(torch.randn(Q_HEADS, 64), torch.randn(KV_HEADS, 64), torch.randn(KV_HEADS, 64)),
        return_rows=True,
    )
    mine, theirs = empty_layer(name), empty_layer(name)
    got = write(q, k, v, mine, step(exact), params)
    wanted = reference.rope_write(q.double(), k.double(), v.double(), theirs, step(exact), params)
    torch.testing.assert_close(got.q.double(), wanted.q, atol=1e-5, rtol=1e-5)
    same_pages(mine, theirs)


def test_the_first_slot_of_all_is_written(implementation):
    write = write_of(implementation, "int8", 64)
    layer = empty_layer("int8")
    q, k, v = inputs(1)
    write(q, k, v, layer, plan_batch([1], [1], [[0]], PAGE), WriteParams())
    kept = gather_request(layer.value, torch.tensor([0]), 1, torch.float32)
    assert (rotate(kept) - v).norm() < 0.02 * v.norm()


def test_a_bias_is_added_before_anything_is_rounded(implementation):
    write = write_of(implementation, "none", 64)
    q, k, v = (each.bfloat16() for each in inputs(30))
    bias = tuple(torch.full((each.shape[1], 64), 2.0**-9).bfloat16() for each in (q, k, v))
    params = WriteParams(norm=QKNorm(torch.ones(64), torch.ones(64), eps=0.0), bias=bias)
    mine, theirs = empty_layer("none"), empty_layer("none")
    got = write(q, k, v, mine, step(False), params)
    wanted = reference.rope_write(q.double(), k.double(), v.double(), theirs, step(False), params)
    assert torch.equal(got.q, wanted.q.bfloat16())
    torch.testing.assert_close(mine.key.codes, theirs.key.codes, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine.value.codes, theirs.value.codes)


def test_rope_uses_absolute_positions(implementation):
    write = write_of(implementation, "none", 64)
    table = rope_table(64, 64)
    q, k, v = inputs(30)
    layer, batch = empty_layer("none"), step(False)
    written = write(q, k, v, layer, batch, WriteParams(rope=table))
    positions = torch.cat([torch.arange(20), torch.tensor([29]), torch.arange(31, 40)])
    torch.testing.assert_close(written.q, apply_rope(q, positions, table), atol=2e-6, rtol=2e-6)
    held = gather_request(layer.key, batch.page_table[2], 40, torch.float32)[31:]
    torch.testing.assert_close(held, apply_rope(k, positions, table)[21:], atol=2e-6, rtol=2e-6)


def test_slot_minus_one_is_skipped(implementation):
    write = write_of(implementation, "int8", 64)
    q, k, v = inputs(30)
    layer, batch = empty_layer("int8"), step(False)
    batch.slots[5:8] = -1
    write(q, k, v, layer, batch, WriteParams())
    codes = layer.key.codes[3].transpose(0, 1)
    assert (codes[5:8] == 0).all() and (codes[:5] != 0).any() and (codes[8:] != 0).any()
    assert (layer.key.codes[[4, 6, 8, 10, 11]] == 0).all()


@pytest.mark.parametrize("name", DYNAMIC)
def test_hard_rows_come_back(implementation, name):
    write = write_of(implementation, name, 64)
    exact = FORMATS[name].exact_pages is not None
    q, k, v = inputs(30)
    k[0], v[0] = 0.0, 0.0
    k[1], v[1] = 3.0, -3.0
    k[2, :, 7], v[2, :, 7] = 1e4, -1e4
    k[3], v[3] = 1e-41, 1e-41
    layer, batch = empty_layer(name), step(exact)
    rows = write(q, k, v, layer, batch, WriteParams(return_rows=True)).k_rows
    assert torch.isfinite(rows).all()
    turned = rotate(k) if FORMATS[name].key.rotation == "hadamard" else k
    assert (rows[0] == 0).all()
    relative = (rows[:3] - turned[:3]).flatten(1).norm(dim=1) / turned[:3].flatten(1).norm(
        dim=1
    ).clamp_min(1e-9)
    assert (relative < rounding_error(FORMATS[name].key)).all()
    assert rows[3].abs().max() < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_non_finite_stays_in_its_token_and_head(implementation, name, bad):
    write = write_of(implementation, name, 64)
    exact = FORMATS[name].exact_pages is not None
    q, k, v = inputs(30)
    clean, dirty = empty_layer(name), empty_layer(name)
    write(q, k, v, clean, step(exact), WriteParams())
    k, v = k.clone(), v.clone()
    k[4, 1, 9], v[6, 0, 2] = bad, bad
    write(q, k, v, dirty, step(exact), WriteParams())
    for a, b, token, head in ((clean.key, dirty.key, 4, 1), (clean.value, dirty.value, 6, 0)):
        mine, theirs = (dequantize(x.codes, x.scale, x.zero, x.spec, torch.float32) for x in (a, b))
        assert torch.isfinite(theirs).all()
        mine[3, head, token] = theirs[3, head, token]
        assert torch.equal(mine, theirs)


def test_checked_mode_names_layer_tensor_and_token(implementation):
    write = write_of(implementation, "int8", 64)
    q, k, v = inputs(30)
    v[7, 1, 3] = torch.nan
    layer = empty_layer("int8")
    with pytest.raises(NonFiniteInput, match="layer 5, value, token 7"):
        write(q, k, v, layer, step(False), WriteParams(checked=True, layer=5))
    assert (layer.key.codes == 0).all(), "nothing may be written before the error"


@pytest.mark.parametrize("name", ["int4", "k8v4"])
def test_exact_pages_hold_the_numbers_themselves(implementation, name):
    write = write_of(implementation, name, 64)
    if FORMATS[name].exact_pages is None:
        pytest.skip(f"{name} keeps no exact pages")
    q, k, v = inputs(30)
    layer, batch = empty_layer(name), step(True)
    write(q, k, v, layer, batch, WriteParams())
    held = gather_request(layer.exact().key, batch.exact.page_table[0], 20, torch.float32)
    torch.testing.assert_close(held, rotate(k)[:20], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", DYNAMIC)
def test_keys_are_mapped_before_they_are_cached(implementation, name, head_dim, mean):
    write = write_of(implementation, name, head_dim)
    given, exact = FORMATS[name], FORMATS[name].exact_pages is not None
    mapped = random_map(head_dim, mean)
    q, k, v = inputs(30, head_dim)
    if mean:
        k = k + mapped.mean
    params = WriteParams(rope=rope_table(64, 32), return_rows=True)
    layer = replace(empty_layer(name, head_dim), key_map=mapped)
    got = write(q, k, v, layer, step(exact), params)
    # By hand: what the product of a query and a key is made of.
    positions = step(False).positions
    q_turned, k_turned = (apply_rope(x, positions, params.rope) for x in (q, k))
    by_head = mapped.scale.repeat_interleave(Q_HEADS // KV_HEADS, 0)
    wanted_q = q_turned / by_head
    wanted_k = (k_turned - (mapped.mean if mean else 0.0)) * mapped.scale
    turn = rotate if given.key.rotation == "hadamard" else (lambda x: x)
    torch.testing.assert_close(got.q, turn(wanted_q), atol=1e-4, rtol=1e-5)
    wanted = dequantize(*quantize(turn(wanted_k), given.key), given.key)
    same_save_ties(got.k_rows, wanted, given.key)
    held = gather_request(layer.key, step(exact).page_table[0], 20, torch.float32)
    torch.testing.assert_close(held, got.k_rows[:20], atol=1e-4, rtol=1e-5)
    if exact:
        near = gather_request(layer.exact().key, step(True).exact.page_table[0], 20, torch.float32)
        torch.testing.assert_close(near, turn(wanted_k)[:20], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("name", ["int4", "int6"])
def test_keys_are_turned_before_they_are_rotated(implementation, name, head_dim):
    write = write_of(implementation, name, head_dim)
    given, exact = FORMATS[name], FORMATS[name].exact_pages is not None
    noise = torch.Generator().manual_seed(5)
    turn = torch.randn(KV_HEADS, head_dim, head_dim, generator=noise) * 0.3 / head_dim**0.5
    mapped = replace(random_map(head_dim), turn=turn + torch.eye(head_dim))
    q, k, v = inputs(30, head_dim)
    k = k + mapped.mean
    params = WriteParams(rope=rope_table(64, 32), return_rows=True)
    layer = replace(empty_layer(name, head_dim), key_map=mapped)
    got = write(q, k, v, layer, step(exact), params)
    # By hand, in float64: the inverse of what keys are multiplied with.
    positions, whole = step(False).positions, torch.float64
    q_turned, k_turned = (apply_rope(x, positions, params.rope).to(whole) for x in (q, k))
    scale, matrix = mapped.scale.to(whole), mapped.turn.to(whole)
    wanted_k = torch.einsum("thi,hij->thj", (k_turned - mapped.mean) * scale, matrix)
    by_head = (x.repeat_interleave(Q_HEADS // KV_HEADS, 0) for x in (scale, matrix.inverse()))
    scale, back = by_head
    wanted_q = torch.einsum("thi,hji->thj", q_turned / scale, back)
    torch.testing.assert_close(got.q.to(whole), rotate(wanted_q), atol=2e-4, rtol=1e-4)
    codes = dequantize(*quantize(rotate(wanted_k).float(), given.key), given.key)
    same_save_ties(got.k_rows, codes, given.key)
    if exact:
        near = gather_request(layer.exact().key, step(True).exact.page_table[0], 20, torch.float32)
        torch.testing.assert_close(near.to(whole), rotate(wanted_k)[:20], atol=2e-3, rtol=1e-4)


def test_non_finite_keys_stay_in_their_token_through_a_map(implementation):
    write = write_of(implementation, "int8", 64)
    q, k, v = inputs(30)
    clean, dirty = (replace(empty_layer("int8"), key_map=random_map(64)) for _ in range(2))
    write(q, k, v, clean, step(False), WriteParams())
    k = k.clone()
    k[4, 1, 9], k[5, 0, 3] = torch.nan, torch.inf
    write(q, k, v, dirty, step(False), WriteParams())
    mine, theirs = (dequantize(*planes(x.key), x.key.spec, torch.float32) for x in (clean, dirty))
    assert torch.isfinite(theirs).all()
    mine[3, 1, 4], mine[3, 0, 5] = theirs[3, 1, 4], theirs[3, 0, 5]
    assert torch.equal(mine, theirs)


def planes(pages):
    return pages.codes, pages.scale, pages.zero


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", ["int8", "int4", "k8v4", "int8_static", "int4_static"])
def test_keys_are_rounded_in_turn(implementation, name, head_dim):
    write = write_of(implementation, name, head_dim)
    given, exact = FORMATS[name], FORMATS[name].exact_pages is not None
    turned = given.key.rotation == "hadamard"
    noise = torch.Generator().manual_seed(9)
    metric = torch.randn(KV_HEADS, head_dim, 24, generator=noise)
    metric = metric @ metric.mT + 0.1 * torch.eye(head_dim)
    key_map = with_feedback(random_map(head_dim), metric, turned)
    q, k, v = inputs(30, head_dim)
    k = k + key_map.mean
    k[3, 1, 2], k[4, 0] = torch.nan, key_map.mean[0]
    static = None
    if not given.dynamic:
        static = tuple(
            (torch.full(spec.granularity.scale_shape(KV_HEADS, head_dim), 0.5).to(spec.scale_dtype),
             torch.zeros(spec.granularity.scale_shape(KV_HEADS, head_dim)).to(spec.scale_dtype)
             if spec.zero_point else None)
            for spec in (given.key, given.value)
        )  # fmt: skip
    layers = []
    for _ in range(2):
        cache = PagedKVCache(12, 12)
        layout = CacheLayout(KV_HEADS, head_dim, given, PAGE, torch.float32)
        cache.add_layer(0, layout, static, key_map)
        layers.append(cache.layer(0))
    params = WriteParams(return_rows=True)
    got = write(q, k, v, layers[0], step(exact), params)
    wanted = reference.rope_write(q, k, v, layers[1], step(exact), params)
    torch.testing.assert_close(got.v_rows, wanted.v_rows, atol=1e-2, rtol=1e-2)
    # A code on a tie moves all that are rounded after it, to a row that is as good.
    same = (got.k_rows - wanted.k_rows).abs().amax(-1) < 1e-3 * wanted.k_rows.abs().amax(-1) + 1e-6
    assert same.double().mean() > 0.9
    turn = rotate if turned else (lambda x: x)
    x = turn(key_map.keys(k.nan_to_num(0.0)))
    x[3, 1] = wanted.k_rows[3, 1]
    lower = key_map.feedback.tril(-1) + torch.eye(head_dim)
    losses = [
        (torch.einsum("thj,hji->thi", rows - x, lower).square()
         * key_map.feedback.diagonal(dim1=1, dim2=2)).sum(-1)
        for rows in (got.k_rows, wanted.k_rows)
    ]  # fmt: skip
    torch.testing.assert_close(losses[0].mean(), losses[1].mean(), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_rejected_draft_leaves_nothing_in_its_slots(implementation, name):
    """Two codes share a byte: a slot that is written again holds the second row alone."""
    write = write_of(implementation, name, 64)
    batch = step(FORMATS[name].exact_pages is not None)
    fresh, again = empty_layer(name), empty_layer(name)
    q, k, v = inputs(30, seed=1)
    write(q, k, v, fresh, batch, WriteParams())
    write(*inputs(30, seed=2), again, batch, WriteParams())
    write(q, k, v, again, batch, WriteParams())
    for mine, other in ((fresh.key, again.key), (fresh.value, again.value)):
        for plane, second in zip(
            (mine.codes, mine.scale, mine.zero), (other.codes, other.scale, other.zero), strict=True
        ):
            assert plane is second is None or torch.equal(
                plane.view(torch.uint8), second.view(torch.uint8)
            )
    for plane in ("exact_key", "exact_value"):
        wanted, held = getattr(fresh, plane), getattr(again, plane)
        assert wanted is held is None or torch.equal(wanted, held)
