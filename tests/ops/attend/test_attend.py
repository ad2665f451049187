"""Every implementation that runs on this CPU against the float64 reference: the shared matrix.

An implementation that is added to ``attend.CANDIDATES`` is picked up here by itself; where it
refuses, the test is skipped with its own sentence.
"""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.formats import FORMATS, KeyMap
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import (
    CANDIDATES,
    AttendParams,
    attend,
    merge_partials,
    reference,
)
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rope_write.reference import rope_write
from tests.ops.mask_cases import Cached, cached
from tests.tolerances import attention_atol, lse_atol

pytestmark = pytest.mark.cpu

IMPLEMENTATIONS = [each for each in CANDIDATES if each.name not in ("triton", "gluon")]
NAMES = [each.name for each in IMPLEMENTATIONS]
MASKS = {
    "causal": CausalMask(),
    "window": CausalMask(window=21),
    "window and sink tokens": CausalMask(window=21, sink_tokens=3),
    "full": FullMask(),
}


@pytest.fixture(params=IMPLEMENTATIONS, ids=NAMES)
def implementation(request):
    return request.param


def skip_if_refused(implementation, case: Cached, name: str, phase: str, mask):
    key = case.layer.key
    call = Call(
        device=device_info("cpu"),
        format=FORMATS[name],
        dtype=torch.float32,
        q_heads=case.q[0].shape[1],
        kv_heads=key.kv_heads,
        head_dim=key.head_dim,
        value_head_dim=case.layer.value.head_dim,
        page_size=case.page_size,
        phase=phase,
        mask=mask.kind,
    )
    reasons = implementation.refusals(call)
    if reasons:
        pytest.skip(" ".join(reasons))


def check(implementation, case, chunks, mask=CausalMask(), **extras):  # noqa: B008
    """One step against the reference; returns its output."""
    q, batch = case.step(chunks)
    params = AttendParams(case.layer.key.head_dim**-0.5, mask, **extras)
    out, lse = attend(q.float(), case.layer, batch, params, implementation)
    wanted, wanted_lse = reference.attend(q, case.layer, batch, params)
    longest = max(end for _, end in chunks)
    head_dim = case.layer.key.head_dim
    empty = wanted_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(
        lse[~empty].double(), wanted_lse[~empty], atol=lse_atol(head_dim), rtol=0
    )
    torch.testing.assert_close(out.double(), wanted, atol=attention_atol(head_dim, longest), rtol=0)
    return out


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_page_sizes(implementation, name, page_size, phase):
    case = cached(name, [63, 100, 150], page_size=page_size)
    skip_if_refused(implementation, case, name, phase, CausalMask())
    steps = {
        "prefill": [(0, 63), (36, 100), (149, 150)],
        "decode": [(62, 63), (99, 100), (146, 150)],
    }
    check(implementation, case, steps[phase])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["none", "int8", "int4", "fp8_static"])
def test_masks_sinks_and_softcap(implementation, name, mask, phase):
    case = cached(name, [63, 150])
    skip_if_refused(implementation, case, name, phase, mask)
    sinks = torch.randn(4)
    step = [(10, 63), (100, 150)] if phase == "prefill" else [(62, 63), (149, 150)]
    check(implementation, case, step, mask)
    check(implementation, case, step, mask, softcap=3.0, sinks=sinks)


@pytest.mark.parametrize(
    "heads", [(1, 1, 64), (7, 1, 64), (6, 2, 80), (4, 4, 96), (16, 1, 128), (4, 2, 256)], ids=str
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_heads_and_channels(implementation, name, heads, phase):
    q_heads, kv_heads, head_dim = heads
    case = cached(name, [70, 33], q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    skip_if_refused(implementation, case, name, phase, CausalMask())
    check(implementation, case, [(50 if phase == "prefill" else 69, 70), (32, 33)])


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_results_do_not_depend_on_the_cut(implementation, name, page_size):
    case = cached(name, [230], page_size=page_size)
    skip_if_refused(implementation, case, name, "prefill", CausalMask())
    whole = check(implementation, case, [(0, 230)])
    for size in (7, 64, 100):
        cuts = [(a, min(a + size, 230)) for a in range(0, 230, size)]
        parts = [_run(implementation, case, [cut]) for cut in cuts]
        torch.testing.assert_close(torch.cat(parts), whole, atol=attention_atol(32, 230), rtol=0)
    ones = torch.cat([_run(implementation, case, [(a, a + 1)]) for a in range(200, 230)])
    torch.testing.assert_close(ones, whole[200:], atol=attention_atol(32, 230), rtol=0)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_ragged_batch_equals_its_requests_alone(implementation, name):
    lengths = [1, 63, 100, 17]
    case = cached(name, lengths)
    skip_if_refused(implementation, case, name, "prefill", CausalMask())
    together = check(implementation, case, [(0, 1), (20, 63), (99, 100), (0, 17)])
    start = 0
    for index, (first, last) in enumerate([(0, 1), (20, 63), (99, 100), (0, 17)]):
        tables = case.exact_tables
        alone = replace(
            case,
            q=[case.q[index]],
            tables=[case.tables[index]],
            exact_tables=None if tables is None else [tables[index]],
        )
        out = _run(implementation, alone, [(first, last)])
        rows = together[start : start + last - first]
        torch.testing.assert_close(out, rows, atol=attention_atol(32, 100), rtol=0)
        start += last - first


@pytest.mark.parametrize("context", [1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("name", ["int8", "int4", "none"])
def test_contexts_around_a_page(implementation, name, context):
    case = cached(name, [context])
    skip_if_refused(implementation, case, name, "prefill", CausalMask())
    check(implementation, case, [(0, context)])
    check(implementation, case, [(context - 1, context)])


def test_a_tile_border_shows_no_future_token(implementation):
    # Where FastDeploy's flash_mask read future tokens: keys - queries no multiple of the tile.
    case = cached("int8", [576], page_size=64)
    skip_if_refused(implementation, case, "int8", "prefill", CausalMask())
    check(implementation, case, [(64, 576)])


def test_requests_without_tokens(implementation):
    case = cached("int8", [40, 1, 70])
    skip_if_refused(implementation, case, "int8", "decode", CausalMask())
    check(implementation, case, [(39, 40), (1, 1), (69, 70)])


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4"])
def test_garbage_outside_the_mask_cannot_be_seen(implementation, name):
    # NaN scales and garbage codes before the window, in pages that nobody owns, after the end.
    case = cached(name, [100], page_size=16)
    mask = CausalMask(window=20)
    skip_if_refused(implementation, case, name, "decode", mask)
    clean = _run(implementation, case, [(99, 100)], mask)
    hidden = case.tables[0][1:4]
    for half in (case.layer.key, case.layer.value):
        for plane in (half.codes, half.scale, half.zero):
            if plane is not None and plane.ndim == 4:
                plane.view(torch.uint8)[hidden] = 0xFF
    poisoned = _run(implementation, case, [(99, 100)], mask)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "k8v4"])
def test_garbage_inside_a_page_that_is_read_cannot_be_seen(implementation, name):
    # Sink tokens 0..2 and the window 74..99: keys 3..73 are hidden, pages 0 and 4 are both.
    case = cached(name, [100], page_size=16)
    mask = CausalMask(window=26, sink_tokens=3)
    skip_if_refused(implementation, case, name, "decode", mask)
    clean = _run(implementation, case, [(99, 100)], mask)
    for position in range(3, 74):
        page, offset = case.tables[0][position // 16], position % 16
        for half in (case.layer.key, case.layer.value):
            for plane in (half.codes, half.scale, half.zero):
                if plane is not None and plane.ndim == 4:
                    plane.view(torch.uint8)[page, :, offset] = 0xFF
        for plane in (case.layer.exact_key, case.layer.exact_value):
            if plane is not None:
                plane.view(torch.uint8)[page, :, offset] = 0xFF
    assert torch.equal(clean, _run(implementation, case, [(99, 100)], mask))


def test_merging_selects_and_never_multiplies_an_empty_partial():
    out, other = torch.randn(3, 2, 8), torch.full((3, 2, 8), torch.nan)
    lse, empty = torch.randn(3, 2), torch.full((3, 2), -torch.inf)
    merged, total = merge_partials([out, other], [lse, empty])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse)
    nothing, none = merge_partials([other, other], [empty, empty])
    assert (nothing == 0).all() and none.isneginf().all()
    sunk, _ = merge_partials([out, other], [lse, empty], sinks=lse[0])
    torch.testing.assert_close(sunk[0], out[0] / 2)


def test_constant_and_zero_rows(implementation):
    case = cached("int8", [50])
    skip_if_refused(implementation, case, "int8", "decode", CausalMask())
    case.layer.key.codes.zero_()
    out = check(implementation, case, [(49, 50)])
    case.layer.value.codes.zero_()
    assert (_run(implementation, case, [(49, 50)]) == 0).all()
    assert torch.isfinite(out).all()


def _run(implementation, case, chunks, mask=CausalMask()):  # noqa: B008
    q, batch = case.step(chunks)
    params = AttendParams(case.layer.key.head_dim**-0.5, mask)
    return attend(q.float(), case.layer, batch, params, implementation)[0]


def _mapped_and_plain(name, head_dim=32, tokens=90):
    """The same keys, with a mean and scales apart, in pages with a key map and in pages without."""
    noise = torch.Generator().manual_seed(3)
    given = FORMATS[name]
    mapped = KeyMap(
        torch.rand(2, head_dim, generator=noise) * 2 + 0.3,
        torch.randn(2, head_dim, generator=noise) * 3,
    )
    mapped.scale[:, ::3] *= -1
    k, v = (torch.randn(tokens, 2, head_dim, generator=noise).double() for _ in range(2))
    k = k + mapped.mean.double()
    q = torch.randn(tokens, 6, head_dim, generator=noise).double()
    tables = [list(range(6))]
    exact = tables if given.exact_pages is not None else None
    batch = plan_batch([tokens], [tokens], tables, 16, exact_tables=exact)
    found = []
    for key_map in (mapped, None):
        cache = PagedKVCache(6, 6)
        cache.add_layer(0, CacheLayout(2, head_dim, given, 16, torch.float32), key_map=key_map)
        layer = cache.layer(0)
        written = rope_write(q, k, v, layer, batch, WriteParams())
        found.append((written.q, layer))
    return found, batch


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -3.0, 8.0, 0.0, 30.0, -60.0])])
@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_a_key_map_changes_neither_outputs_nor_log_sums(implementation, name, sinks):
    skip_if_refused(implementation, cached(name, [20], q_heads=6), name, "prefill", CausalMask())
    ((q, layer), (plain_q, plain)), batch = _mapped_and_plain(name)
    params = AttendParams(32**-0.5, sinks=sinks)
    out, lse = attend(q.float(), layer, batch, params, implementation)
    wanted, wanted_lse = reference.attend(plain_q, plain, batch, params)
    # Codes are others: what is left is the format's own error.
    loss = {"none": 1e-5, "int8": 0.1, "int4": 1.0}[name]
    torch.testing.assert_close(lse.double(), wanted_lse, atol=loss, rtol=0)
    torch.testing.assert_close(out.double(), wanted, atol=loss, rtol=0)


def test_a_mean_under_a_softcap_is_refused(implementation):
    skip_if_refused(implementation, cached("none", [60]), "none", "prefill", CausalMask())
    ((q, layer), _), batch = _mapped_and_plain("none")
    with pytest.raises(ValueError, match=r"key_map: expected one without a mean.* softcap 30"):
        attend(q.float(), layer, batch, AttendParams(0.2, softcap=30.0), implementation)
    scaled = replace(layer, key_map=KeyMap(layer.key_map.scale))
    attend(q.float(), scaled, batch, AttendParams(0.2, softcap=30.0), implementation)


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "k8v4"])
def test_pages_that_a_window_has_left_may_be_any_page(implementation, name):
    mask, size = CausalMask(window=37), 16
    case = cached(name, [150, 230])
    skip_if_refused(implementation, case, name, "prefill", mask)
    used = {page for table in case.tables for page in table}
    # Nobody's: poison in every slot. An exact page that stands for another is poison as well.
    poison = min(set(range(len(used) + 2)) - used)
    for new in ((1, 1), (40, 7)):
        chunks = [(len(q) - n, len(q)) for q, n in zip(case.q, new, strict=True)]
        whole = _run(implementation, case, chunks, mask)
        left = [(start - mask.window + 1) // size for start, _ in chunks]
        assert min(left) > 3
        tables = [
            [poison] * gone + table[gone:] for gone, table in zip(left, case.tables, strict=True)
        ]
        exact = None if case.exact_tables is None else tables
        part = _run(implementation, replace(case, tables=tables, exact_tables=exact), chunks, mask)
        assert torch.equal(part, whole)


@pytest.mark.parametrize("name", ["int8", "int8_exact", "fp8"])
def test_rows_that_fit_float16_may_not_while_they_are_rotated(implementation, name):
    case = cached(name, [150], head_dim=64)
    skip_if_refused(implementation, case, name, "prefill", CausalMask())
    tokens, size, noise = 150, 16, torch.Generator().manual_seed(0)
    k, v = (torch.randn(tokens, 2, 64, generator=noise) for _ in range(2))
    # In the body; turned, the first channel of a block is several times as large.
    v[size : tokens - 3 * size] += 40000.0
    q = torch.randn(tokens, 4, 64, generator=noise).half()
    k, v = k.half(), v.half()
    table = list(range(-(-tokens // size)))
    exact = [table] if FORMATS[name].exact_pages is not None else None
    batch = plan_batch([tokens], [tokens], [table], size, exact_tables=exact)
    cache = PagedKVCache(len(table), len(table))
    cache.add_layer(0, CacheLayout(2, 64, FORMATS[name], size, torch.float16))
    layer = cache.layer(0)
    turned = rope_write(q, k, v, layer, batch, WriteParams()).q
    params = AttendParams(0.125)
    out, _ = attend(turned, layer, batch, params, implementation, model_basis=True)
    wide, _ = attend(turned.double(), layer, batch, params, "torch", model_basis=True)
    assert wide.abs().max() < 65504
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), wide, atol=40000 * 2.0**-9, rtol=0)
