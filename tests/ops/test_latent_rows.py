"""Latent rows (MLA): a row is a token's value and the first channels of its key.

The oracle is a softmax over dense keys and values, made in this file of what was written.
"""

import re
from dataclasses import replace

import pytest
import torch

import quantpage
from quantpage.agreement import allowed
from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cache.cells import cell_bytes, layer_of_cells
from quantpage.cpu_core import find_core
from quantpage.explain import example_call
from quantpage.formats import FORMATS, KeyMap, dequantize, find_format, rotate
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import CANDIDATES, AttendParams, attend, cpu
from quantpage.ops.attend import reference as attend_reference
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.rope_write import QKNorm, WriteParams, rope_write
from quantpage.rope import rope_table
from tests.ops.cpu_cases import AVAILABLE, Shape, make_case
from tests.tolerances import assert_within

pytestmark = pytest.mark.cpu

RANK, ROTARY, HEADS, PAGE = 96, 32, 6, 16
SCALE = 0.11
NEAR = 1e-4
"""Queries and weights of integer codes are rounded to 15 bits by the compiled core."""
DYNAMIC = [name for name, each in FORMATS.items() if each.dynamic]
NAMES = [*DYNAMIC, "k=int8,v=fp8", "k=fp8,v=int4", "int4_near8"]


def layout_of(name, dtype=torch.float32):
    return CacheLayout(1, RANK, find_format(name), PAGE, dtype, ROTARY, latent=True)


def rows_of(tokens, seed=0):
    """Latent rows and rotary keys of unlike size, and absorbed queries."""
    noise = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, 1, RANK, generator=noise)
    rotary = 6 * torch.randn(tokens, 1, ROTARY, generator=noise)
    q = torch.randn(tokens, HEADS, RANK + ROTARY, generator=noise)
    return q, latent, rotary


def step(news, contexts, first_page=0):
    """The plan of a step of requests whose pages lie one after the other."""
    tables, at = [], first_page
    for context in contexts:
        count = -(-context // PAGE)
        tables.append(list(range(at, at + count)))
        at += count
    return plan_batch(news, contexts, tables, PAGE, exact_tables=tables)


def filled(name, contexts=(75, 40), implementation=None):
    """A cache after two prompts, their plan, what was written, and the queries as handed back."""
    pages = sum(-(-context // PAGE) for context in contexts)
    cache = PagedKVCache(pages, pages)
    cache.add_layer(0, layout_of(name))
    batch = step(list(contexts), list(contexts))
    q, latent, rotary = rows_of(sum(contexts))
    written = rope_write(
        q, latent, rotary, cache.layer(0), batch, WriteParams(return_rows=True), implementation
    )
    return cache, batch, (q, latent, rotary), written


def held(layer, first, context):
    """[(rows, rotary keys)] of a request, float64: what its codes say, and its exact pages."""
    found = []
    for view in (layer.body(), layer.exact()) if layer.exact_key is not None else (layer,):
        pair = []
        for half, body in ((view.key, layer.key), (view.value, layer.value)):
            seen = dequantize(half.codes, half.scale, half.zero, half.spec, torch.float64)
            # Exact pages are in the basis of the codes.
            seen = rotate(seen) if body.spec.rotation == "hadamard" else seen
            pair.append(seen[:, 0].flatten(0, 1)[first * PAGE : first * PAGE + context])
        found.append(tuple(pair))
    return found


def dense(layer, q, contexts, mask):
    """softmax(q . [row, rotary]) row in float64."""
    found, start, first = [], 0, 0
    for context in contexts:
        part, positions = slice(start, start + context), torch.arange(context)
        kept = held(layer, first, context)
        start, first = start + context, first - (-context // PAGE)
        near = exact_pairs(positions, positions, PAGE) & (len(kept) > 1)
        scores = [
            torch.einsum("qhd,kd->hqk", q[part].double(), torch.cat(pair, 1)) * SCALE
            for pair in kept
        ]
        seen = mask.materialize(positions, context)
        weights = torch.where(near, scores[-1], scores[0]).masked_fill(~seen, -torch.inf)
        weights = weights.softmax(-1)
        out = weights.masked_fill(near, 0.0) @ kept[0][0]
        out = out + weights.masked_fill(~near, 0.0) @ kept[-1][0]
        found.append(out.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("mask", [CausalMask(), CausalMask(window=21), FullMask()], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_value_and_the_first_channels_of_the_key(name, mask):
    cache, batch, rows, written = filled(name)
    params = AttendParams(SCALE, mask)
    out, lse = attend(written.q, cache.layer(0), batch, params, model_basis=True)
    want = dense(cache.layer(0), rows[0], (75, 40), mask)
    assert out.shape == (115, HEADS, RANK) and lse.shape == (115, HEADS)
    assert (out - want).norm() < NEAR * want.norm()


@pytest.mark.parametrize("name", ["none", "int8", "int4", "int4_near8", "fp8", "k=int8,v=fp8"])
def test_what_is_held_is_what_was_written(name):
    cache, _, (_, latent, rotary), _ = filled(name, (75,))
    kept = held(cache.layer(0), 0, 75)
    near = {"none": 1e-6, "int4": 1e-6}.get(name, 0.05)
    for got, given in zip(kept[-1], (latent, rotary), strict=True):
        assert (got - given[:, 0]).norm() < near * given.norm()
    for got, given in zip(kept[0], (latent, rotary), strict=True):
        assert (got - given[:, 0]).norm() < 0.2 * given.norm()


@pytest.mark.parametrize("name", ["none", "int8", "int4_near8", "k=fp8,v=int4"])
def test_the_reference_says_the_same(name):
    cache, batch, rows, written = filled(name, (40,))
    out, lse = attend_reference.attend(written.q, cache.layer(0), batch, AttendParams(SCALE))
    out = rotate(out) if cache.layer(0).out_rotated else out
    want = dense(cache.layer(0), rows[0], (40,), CausalMask())
    assert (out - want).norm() < 5e-6 * want.norm()
    found = attend(written.q, cache.layer(0), batch, AttendParams(SCALE), "torch")[1]
    torch.testing.assert_close(found.double(), lse, atol=1e-5, rtol=1e-5)
    served = attend(written.q, cache.layer(0), batch, AttendParams(SCALE))[1]
    torch.testing.assert_close(served.double(), lse, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("name", ["none", "int8", "int4", "fp8", "k=int8,v=fp8"])
def test_queries_are_turned_by_the_halves_that_they_meet(name):
    """q . k is what it was before both were turned."""
    cache, _, (q, latent, rotary), written = filled(name, (33,), "torch")
    keys = torch.cat([latent, rotary], -1).double()
    turned = [
        rotate(x.double()) if spec.rotation == "hadamard" else x.double()
        for x, spec in (
            (latent, cache.layer(0).key.spec),
            (rotary, cache.layer(0).value.spec),
        )
    ]
    wanted = (q.double() * keys).sum(-1)
    found = (written.q.double() * torch.cat(turned, -1)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(find_core() is None, reason="needs the compiled core")
@pytest.mark.parametrize("name", ["none", "int8", "int4", "k=int8,v=fp8"])
def test_the_core_writes_what_the_reference_writes(name):
    ours, _, _, by_core = filled(name, implementation="cpu")
    theirs, _, _, by_torch = filled(name, implementation="torch")
    torch.testing.assert_close(by_core.q, by_torch.q)
    for half in ("key", "value"):
        mine, wanted = (getattr(each.layer(0), half).codes.float() for each in (ours, theirs))
        # Codes may differ on a rounding tie.
        assert (mine != wanted).float().mean() < 1e-3


WIDE = Shape(512, 16, 1, 16, (1, 3), (300, 77), value_dim=64)
MANY_HEADS = Shape(96, 70, 1, 32, (2,), (133,), value_dim=32)
PROMPT = Shape(80, 5, 1, 16, (90, 1), (90, 40), value_dim=16)


def random_rows(name, shape, dtype=torch.float32):
    """Rows, queries and a step, NaN where nobody may look."""
    _, layer, batch = make_case(find_format(name), shape, dtype)
    width = shape.head_dim + shape.value_dim
    q = torch.randn(sum(shape.query_lens), shape.q_heads, width).to(dtype)
    return q, replace(layer, latent=True), batch


@pytest.mark.skipif(not AVAILABLE, reason="needs the compiled core")
@pytest.mark.parametrize("shape", [WIDE, MANY_HEADS, PROMPT], ids=["wide", "heads", "prompt"])
@pytest.mark.parametrize("name", [*FORMATS, "k=int8,v=fp8", "k=fp8,v=int4"])
def test_the_core_attends_to_rows_in_every_instruction_set(name, shape):
    torch.manual_seed(0)
    q, layer, batch = random_rows(name, shape)
    for params in (
        AttendParams(SCALE),
        AttendParams(SCALE, CausalMask(window=21, sink_tokens=2), softcap=5.0),
        AttendParams(SCALE, FullMask(), sinks=torch.randn(shape.q_heads)),
    ):
        wanted = allowed(q, layer, batch, params)
        for isa in AVAILABLE:
            assert_within(wanted, cpu.attend(q, layer, batch, params, isa=isa))


@pytest.mark.skipif(not AVAILABLE, reason="needs the compiled core")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_core_attends_to_rows_in_16_bits(dtype):
    torch.manual_seed(1)
    q, layer, batch = random_rows("int8", WIDE, dtype)
    wanted = allowed(q, layer, batch, AttendParams(SCALE))
    for isa in AVAILABLE:
        assert_within(wanted, cpu.attend(q, layer, batch, AttendParams(SCALE), isa=isa))


@pytest.mark.skipif(not AVAILABLE, reason="needs the compiled core")
@pytest.mark.parametrize("channel", [3, WIDE.head_dim + 3])
def test_a_channel_that_is_not_finite_makes_its_own_row_nan(channel):
    torch.manual_seed(2)
    q, layer, batch = random_rows("int8", WIDE)
    # All scores of one sign: of -inf alone a row would see nothing.
    half = layer.key if channel < WIDE.head_dim else layer.value
    half.codes[..., 3] = -5
    clean = cpu.attend(q, layer, batch, AttendParams(SCALE))[0]
    q[1, 4, channel] = torch.inf
    for isa in AVAILABLE:
        out = cpu.attend(q, layer, batch, AttendParams(SCALE), isa=isa)[0]
        assert out[1, 4].isnan().all()
        out[1, 4] = clean[1, 4]
        torch.testing.assert_close(out, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not AVAILABLE, reason="needs the compiled core")
def test_threads_and_mates_change_no_bit_of_rows():
    torch.manual_seed(3)
    q, layer, batch = random_rows("int8", WIDE)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(cpu.attend(q, layer, batch, AttendParams(SCALE))[0])
    finally:
        torch.set_num_threads(before)
    alone = plan_batch([3], [77], [batch.page_table[1, :5].tolist()], 16)
    found.append(torch.cat([found[0][:1], cpu.attend(q[1:], layer, alone, AttendParams(SCALE))[0]]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_step_over_kept_rows_equals_the_prompt():
    cache, batch, (q, latent, rotary), written = filled("int8", (75,))
    layer, params = cache.layer(0), AttendParams(SCALE)
    whole = attend(written.q, layer, batch, params)[0]
    one = plan_batch([1], [75], [list(range(5))], PAGE)
    last = rope_write(q[-1:], latent[-1:], rotary[-1:], layer, one, WriteParams())
    again = attend(last.q, layer, one, params)[0]
    torch.testing.assert_close(again, whole[-1:], rtol=1e-4, atol=1e-4)


def test_pages_take_what_the_layout_says_and_no_second_row():
    layout = layout_of("int8")
    assert layout.bytes_per_token() == RANK + 2 + ROTARY + 2
    cache = filled("int8")[0]
    view = cache.layer(0)
    taken = sum(
        plane.nbytes for half in (view.key, view.value) for plane in (half.codes, half.scale)
    )
    assert taken == cache.nbytes == cache.pages * PAGE * layout.bytes_per_token()


def test_every_view_of_a_layer_says_that_it_holds_rows(tmp_path):
    cache, _, rows, _ = filled("int4", (75,))
    assert cache.layer(0).latent and cache.layer(0).body().latent and cache.layer(0).exact().latent
    cache.save(tmp_path / "pages", note={"of": "rows"})
    loaded, _ = PagedKVCache.load(tmp_path / "pages", expected=cache.layouts)
    cache.grow(3, 2)
    for each in (cache, loaded):
        layer = each.layer(0)
        assert layer.latent and each.layouts[0].latent
        batch = step([75], [75])
        out = attend(layer.turned(rows[0]), layer, batch, AttendParams(SCALE), model_basis=True)[0]
        want = dense(layer, rows[0], (75,), CausalMask())
        assert (out - want).norm() < NEAR * want.norm()
    ordinary = {0: replace(cache.layouts[0], latent=False)}
    with pytest.raises(quantpage.errors.CorruptCache, match="latent: expected False, got True"):
        PagedKVCache.load(tmp_path / "pages", expected=ordinary)


def test_an_engines_cells_hold_rows():
    layout = layout_of("int8")
    cells = torch.zeros(5, 1, cell_bytes(layout), dtype=torch.uint8)
    layer = layer_of_cells(cells, layout)
    assert layer.latent
    q, latent, rotary = rows_of(75)
    batch = step([75], [75])
    written = rope_write(q, latent, rotary, layer, batch, WriteParams())
    out, _ = attend(written.q, layer, batch, AttendParams(SCALE), model_basis=True)
    want = dense(layer, q, (75,), CausalMask())
    assert (out - want).norm() < NEAR * want.norm()


def test_what_does_not_belong_to_rows_is_refused():
    cache, batch, (q, latent, rotary), written = filled("int8", (40,))
    layer, params = cache.layer(0), AttendParams(SCALE)
    with pytest.raises(ValueError, match=r"q: expected \[40 tokens, q_heads, 128\]"):
        attend(written.q[..., :RANK], layer, batch, params)
    with pytest.raises(ValueError, match=r"out: expected \(40, 6, 96\)"):
        attend(written.q, layer, batch, params, out=torch.empty(40, HEADS, ROTARY))
    for asked, name in (
        (WriteParams(rope=rope_table(64, ROTARY)), "rope"),
        (WriteParams(norm=QKNorm(torch.ones(RANK), torch.ones(RANK))), "norm"),
    ):
        with pytest.raises(ValueError, match=f"params: expected latent rows normed .* got {name}"):
            rope_write(q, latent, rotary, layer, batch, asked)
    with pytest.raises(ValueError, match="key_map: expected None for latent rows"):
        replace(layer, key_map=KeyMap(torch.ones(1, RANK)))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_kernels_that_read_two_planes_refuse_rows_in_a_sentence(kind):
    """Those of latent rows and plain torch do not; Hopper's knows one pair of widths."""
    device = DeviceInfo(kind, kind, (9, 0) if kind == "cuda" else None, 1)
    call = replace(
        example_call(device, FORMATS["int8"]),
        head_dim=64,
        value_head_dim=64,
        kv_heads=1,
        latent=True,
    )
    served = set()
    other = "CUDA device" if kind == "cpu" else "CPU"
    for each in CANDIDATES:
        for phase in ("prefill", "decode"):
            said = each.refusals(replace(call, phase=phase))
            if each.name == "cpu" and find_core() is None:
                continue
            if not said:
                served.add(each.name)
            elif not any(f"needs a {other}" in one for one in said):
                why = "needs (values of their own, got latent|rows of 512 and 64 rotary channels)"
                assert any(re.match(why, one) for one in said)
    core = {"cpu"} if find_core() else set()
    assert served == ({"torch", "triton"} if kind == "cuda" else {"torch"} | core)


def test_an_attention_built_for_rows_takes_no_others():
    cache, batch, (q, latent, rotary), _ = filled("int8", (40,))
    layer = cache.layer(0)
    call = quantpage.Call(
        quantpage.device_info("cpu"), layout_of("int8").format, torch.float32,
        q_heads=HEADS, kv_heads=1, head_dim=RANK, value_head_dim=ROTARY, page_size=PAGE,
        latent=True,
    )  # fmt: skip
    built = quantpage.build_attention(quantpage.find_backend("flash"), CausalMask(), call)
    out, _ = built(q, latent, rotary, layer, batch, WriteParams(), AttendParams(SCALE))
    want = dense(layer, q, (40,), CausalMask())
    assert (out - want).norm() < NEAR * want.norm()
    with pytest.raises(ValueError, match="layer: expected latent rows, as this attention was"):
        built(
            q, latent, rotary, replace(layer, latent=False), batch, WriteParams(),
            AttendParams(SCALE),
        )  # fmt: skip
