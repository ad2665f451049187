"""attend in the compiled core against the reference, in every instruction set."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpage.agreement import allowed
from quantpage.batch import plan_batch
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask, RowIntervals, causal_document
from quantpage.ops.attend import (
    CANDIDATES,
    AttendParams,
    attend,
    cpu,
    reference,
)
from quantpage.ops.dispatch import Call, choose
from tests.ops.cpu_cases import AVAILABLE, Shape, make_case, poison
from tests.tolerances import assert_agrees, assert_within

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not AVAILABLE, reason="no compiled core in this installation"),
]
SHAPES = [
    Shape(128, 8, 2, 16, (1, 1, 1), (100, 33, 1)),
    Shape(64, 3, 1, 64, (1,), (1700,)),
    Shape(80, 4, 4, 16, (5, 0, 1), (40, 7, 300)),
    Shape(96, 4, 1, 32, (70,), (133,)),
    Shape(256, 7, 1, 16, (3,), (90,), value_dim=48),
]


def check_all(q, layer, batch, params):
    """Every instruction set against the reference."""
    wanted = allowed(q, layer, batch, params)
    for isa in AVAILABLE:
        assert_within(wanted, cpu.attend(q, layer, batch, params, isa=isa))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"d{shape.head_dim}")
def test_every_format(name, shape):
    torch.manual_seed(0)
    kv_format = FORMATS[name]
    q, layer, batch = make_case(kv_format, shape)
    params = AttendParams(shape.head_dim**-0.5)
    check_all(q, layer, batch, params)


GROUPED = KVFormat(
    "grouped",
    QuantSpec(CODES["int4"], Granularity(group=32), zero_point=True),
    QuantSpec(CODES["int8"], Granularity(group=16), scale_dtype=torch.float32),
)
ZERO_INT8 = KVFormat(
    "zero",
    QuantSpec(CODES["int8"], zero_point=True),
    QuantSpec(CODES["int4"], scale_dtype=torch.float32),
)
GROUPED_FP8 = KVFormat(
    "grouped_fp8",
    QuantSpec(CODES["fp8"], Granularity(group=32)),
    QuantSpec(CODES["fp8"], Granularity(group=16), dynamic=False),
)
TENSOR_INT8 = KVFormat(
    "tensor",
    QuantSpec(CODES["int8"], Granularity(per_head=False), dynamic=False, scale_dtype=torch.float64),
    QuantSpec(CODES["int8"], Granularity(per_head=False), dynamic=False),
)


@pytest.mark.parametrize(
    "kv_format", [GROUPED, ZERO_INT8, GROUPED_FP8, TENSOR_INT8], ids=lambda each: each.name
)
def test_unnamed_formats(kv_format):
    torch.manual_seed(1)
    for shape in (SHAPES[0], Shape(96, 6, 2, 32, (9,), (80,))):
        q, layer, batch = make_case(kv_format, shape)
        params = AttendParams(shape.head_dim**-0.5)
        check_all(q, layer, batch, params)


def masks_of(shape):
    rows = torch.tensor([[3, 9], [0, 0], [17, 40]]).expand(1, 1, 3, 2).reshape(1, 1, 3, 1, 2)
    long = max(shape.context_lens)
    return [
        FullMask(),
        CausalMask(window=1),
        CausalMask(window=21),
        CausalMask(window=30, sink_tokens=5),
        CausalMask(window=4, sink_tokens=70),
        RowIntervals(rows, first=(min(shape.context_lens) - 2,)),
        causal_document([long // 3, long - long // 3]),
    ]


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4"])
def test_masks_caps_and_sinks(name):
    torch.manual_seed(2)
    shape = Shape(64, 4, 2, 16, (3, 18, 1), (60, 22, 140))
    q, layer, batch = make_case(replace(FORMATS[name], exact_pages=None), shape)
    for mask in masks_of(shape):
        for softcap, sinks in ((None, None), (3.0, torch.randn(4)), (None, torch.randn(4))):
            params = AttendParams(0.125, mask, softcap, sinks)
            check_all(q, layer, batch, params)


def test_window_is_not_read_outside():
    torch.manual_seed(3)
    shape = Shape(128, 4, 2, 16, (2,), (200,))
    for name in ("none", "int8", "int4", "fp8"):
        q, layer, batch = make_case(replace(FORMATS[name], exact_pages=None), shape)
        params = AttendParams(0.1, CausalMask(window=33, sink_tokens=3))
        expected = allowed(q, layer, batch, params)
        unseen = torch.ones(layer.key.pages, 16, dtype=torch.bool)
        for position in (*range(3), *range(198 - 32, 200)):
            unseen[batch.page_table[0, position // 16], position % 16] = False
        poison(layer, unseen)
        assert_within(expected, cpu.attend(q, layer, batch, params))


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("mask", [CausalMask(), CausalMask(window=40, sink_tokens=4), FullMask()])
def test_exact_pages(name, mask):
    torch.manual_seed(4)
    shape = Shape(64, 4, 2, 16, (1, 37, 3, 2), (200, 60, 18, 2))
    kv_format = replace(FORMATS[name], exact_pages=FORMATS["int4"].exact_pages)
    q, layer, batch = make_case(kv_format, shape)
    params = AttendParams(0.125, mask, sinks=torch.randn(4))
    check_all(q, layer, batch, params)


@pytest.mark.parametrize("name", ["int8", "int4", "none", "fp8"])
@pytest.mark.parametrize("value_dim", [128, 80, 16])
def test_outputs_in_the_models_basis(name, value_dim):
    """Turned back in the core as by torch, whatever the row's largest power of two."""
    torch.manual_seed(9)
    shape = Shape(64, 4, 2, 16, (1, 2), (700, 50), value_dim=value_dim)
    q, layer, batch = make_case(FORMATS[name], shape)
    params = AttendParams(0.125, sinks=torch.randn(4))
    wanted = allowed(q, layer, batch, params, model_basis=True)
    chosen = choose(CANDIDATES, call_of(FORMATS[name], shape), "cpu")
    assert_within(wanted, attend(q, layer, batch, params, chosen, model_basis=True))
    for isa in AVAILABLE:
        assert_within(wanted, cpu.attend(q, layer, batch, params, True, isa))


def call_of(kv_format, shape):
    width = shape.value_dim or shape.head_dim
    heads = shape.q_heads, shape.kv_heads, shape.head_dim, width
    return Call(device_info("cpu"), kv_format, torch.float32, *heads, shape.page_size)


def test_odd_pages():
    """Page sizes that no layout allows but a foreign engine may have."""
    torch.manual_seed(5)
    for page_size in (1, 5, 48):
        shape = Shape(64, 2, 1, page_size, (1, 20), (131, 33))
        q, layer, batch = make_case(FORMATS["int8"], shape)
        params = AttendParams(0.125, CausalMask(window=50))
        check_all(q, layer, batch, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_query_dtypes_and_strides(dtype):
    torch.manual_seed(6)
    q, layer, batch = make_case(FORMATS["int8"], SHAPES[0], dtype)
    wide = torch.empty(3, 12, 128, dtype=dtype)
    wide[:, 2:10] = q
    params = AttendParams(0.1)
    out, lse = cpu.attend(wide[:, 2:10], layer, batch, params)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_agrees((out, lse), q, layer, batch, params, dtype)


@pytest.mark.parametrize("name", ["int4_static", "int8_static"])
def test_a_long_context_averages_what_is_random_only(name):
    """A channel of int4_static holds 16 numbers: rounding those once would not average out."""
    torch.manual_seed(10)
    q, layer, batch = make_case(FORMATS[name], Shape(64, 2, 1, 64, (1,), (40000,)))
    params = AttendParams(0.125)
    want, want_lse = reference.attend(q, layer, batch, params)
    for isa in AVAILABLE:
        out, lse = cpu.attend(q, layer, batch, params, isa=isa)
        # 15 bits of each weight, and of the query.
        assert (out - want).abs().max() <= 2.0**-12 * want.abs().max()
        assert (lse - want_lse).abs().max() <= 2.0**-13


def test_threads_and_batch_mates_change_nothing():
    torch.manual_seed(7)
    shape = Shape(64, 6, 2, 16, (1, 1, 50), (2100, 77, 90))
    q, layer, batch = make_case(FORMATS["int8"], shape)
    params = AttendParams(0.125)
    threads = torch.get_num_threads()
    got = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got.append(cpu.attend(q, layer, batch, params))
    finally:
        torch.set_num_threads(threads)
    for out, lse in got[1:]:
        assert torch.equal(out, got[0][0]) and torch.equal(lse, got[0][1])
    alone = replace(
        batch,
        query_starts=batch.query_starts[:2],
        context_lens=batch.context_lens[:1],
        page_table=batch.page_table[:1],
        slots=batch.slots[:1],
        positions=batch.positions[:1],
        query_lens=(1,),
        host_context_lens=(2100,),
    )
    assert torch.equal(cpu.attend(q[:1], layer, alone, params)[0], got[0][0][:1])


@pytest.mark.parametrize("name", ["int8", "int4", "int6", "int3", "int8_static"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 208])
def test_few_rows_and_many_have_the_same_scores(name, head_dim):
    """Rows below and from 16 on are multiplied in ways of their own, both exact."""
    torch.manual_seed(head_dim)
    kv_format = replace(FORMATS[name], exact_pages=None)
    q, layer, batch = make_case(kv_format, Shape(head_dim, 8, 1, 16, (3,), (171,)))
    # Largest channels of one sign and of the other: words at both ends of their range.
    q[0, 0, :2] = torch.tensor([9.0, -9.0])
    params = AttendParams(head_dim**-0.5, mask=FullMask())
    rows, tables = q.split(1), batch.page_table[:, :11].tolist()
    one = plan_batch([1], [171], tables, 16)
    for isa in AVAILABLE:
        _, many = cpu.attend(q, layer, batch, params, isa=isa)
        few = [cpu.attend(row, layer, one, params, isa=isa)[1] for row in rows]
        assert torch.equal(torch.cat(few), many)


def test_a_nan_query_stays_alone():
    torch.manual_seed(8)
    for name in ("int8", "none"):
        q, layer, batch = make_case(FORMATS[name], Shape(64, 2, 2, 16, (2,), (30,)))
        q[0, 0, 5] = torch.nan
        out, _ = cpu.attend(q, layer, batch, AttendParams(0.125))
        assert out[0, 0].isnan().all()
        assert out[0, 1].isfinite().all() and out[1].isfinite().all()


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    requests = draw(st.integers(1, 3))
    new = [draw(st.sampled_from([0, 1, 1, 2, 17, 40])) for _ in range(requests)]
    old = [draw(st.integers(0, 150)) for _ in range(requests)]
    shape = Shape(
        head_dim=16 * draw(st.integers(1, 16)),
        q_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9])),
        kv_heads=kv_heads,
        page_size=draw(st.sampled_from([16, 32, 64, 7])),
        query_lens=tuple(new),
        context_lens=tuple(max(1, n + o) for n, o in zip(new, old, strict=True)),
        value_dim=draw(st.sampled_from([None, 32, 80])),
    )
    window = draw(st.one_of(st.none(), st.integers(1, 60)))
    mask = draw(
        st.sampled_from([CausalMask(window, draw(st.integers(0, 20)) if window else 0), FullMask()])
    )
    params = AttendParams(
        shape.head_dim**-0.5,
        mask,
        draw(st.sampled_from([None, None, 2.0])),
        torch.randn(shape.q_heads) if draw(st.booleans()) else None,
    )
    return shape, params


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    cases(),
    st.sampled_from([*FORMATS, "grouped", "zero", "grouped_fp8"]),
    st.integers(0, 2**20),
)
def test_fuzz(case, name, seed):
    shape, params = case
    extra = {each.name: each for each in (GROUPED, ZERO_INT8, GROUPED_FP8)}
    kv_format = FORMATS.get(name) or extra[name]
    for spec, width in ((kv_format.key, shape.head_dim), (kv_format.value, shape.value_dim)):
        if spec.granularity.group and (width or shape.head_dim) % spec.granularity.group:
            return
    torch.manual_seed(seed)
    q, layer, batch = make_case(kv_format, shape)
    if not q.numel():
        return
    check_all(q, layer, batch, params)
