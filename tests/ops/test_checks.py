"""Calls that cannot be right raise before anything runs, whichever way in they take.

A wrong call never comes to a launch: kernels are asked here without a device or interpreter.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage import masks
from quantpage.attention import build_attention, find_backend
from quantpage.batch import BatchPlan, ExactPlan, derive, plan_batch
from quantpage.cache import CacheLayout, LayerKV, PagedKVCache, QuantizedPages
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, rotate
from quantpage.hardware import device_info
from quantpage.ops import attend as attend_op
from quantpage.ops import gather as gather_op
from quantpage.ops import rope_write as write_op
from quantpage.ops.attend import AttendParams, reference
from quantpage.ops.checks import check_gather
from quantpage.ops.dispatch import Call, Implementation
from quantpage.ops.rope_write import QKNorm, WriteParams
from quantpage.ops.rope_write import reference as write_reference
from quantpage.rope import RopeTable, rope_table

pytestmark = pytest.mark.cpu
PAGE, WIDTH, PAGES, HEADS, KV = 16, 64, 8, 4, 2


def by_target(candidates):
    """One a function; kernels of a Triton that lacks a part are left out."""
    found = {each.target: each for each in candidates}
    made = []
    for target, each in found.items():
        try:
            each.load()
        except ImportError:
            continue
        made.append(pytest.param(each, id=target.split(".")[-1].replace(":", "-")))
    return made


ORACLE = [
    Implementation("reference", "quantpage.ops.attend.reference:attend", lambda call: []),
]
ATTENDS = by_target([*attend_op.CANDIDATES, *ORACLE])
WRITES = by_target(write_op.CANDIDATES)
GATHERS = by_target(gather_op.CANDIDATES)
W, A = WriteParams(), AttendParams(WIDTH**-0.5)
INTERVALS = AttendParams(WIDTH**-0.5, masks.causal_document([20]))


def layer_of(name: str = "int4") -> LayerKV:
    cache = PagedKVCache(PAGES, PAGES)
    cache.add_layer(0, CacheLayout(KV, WIDTH, FORMATS[name], PAGE, torch.float16))
    return cache.layer(0)


def plan(**changes) -> BatchPlan:
    """Five tokens of a prompt and one after nineteen, in pages 3 and 1, 2."""
    made = plan_batch([5, 1], [5, 20], [[3], [1, 2]], PAGE, exact_tables=[[0], [1, 2]])
    return replace(made, **changes) if changes else made


def rows(tokens: int = 6, heads: int = HEADS, width: int = WIDTH, dtype=torch.float16):
    return torch.randn(tokens, heads, width).to(dtype)


def planes(layer: LayerKV) -> list[torch.Tensor]:
    halves = [p for h in (layer.key, layer.value) for p in (h.codes, h.scale, h.zero)]
    return [p for p in (*halves, layer.exact_key, layer.exact_value) if p is not None]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def int64(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


# What each field of a plan cannot be: a wrong dtype, one too few or too many, off by one, negative.
PLANS = [
    ("query_starts", lambda b: b.query_starts.long(), "query_starts: expected torch.int32"),
    ("query_starts", lambda b: b.query_starts[:-1], r"query_starts: expected shape \[3\]"),
    ("query_starts", lambda b: int32(0, 4, 6), r"query_starts\[1\]: expected the sums .* 5"),
    ("query_starts", lambda b: int32(0, 5, 7), r"query_starts\[2\]: expected .* got 7"),
    ("query_starts", lambda b: int32(-1, 5, 6), r"query_starts\[0\]"),
    ("context_lens", lambda b: b.context_lens.long(), "context_lens: expected torch.int32"),
    ("context_lens", lambda b: int32(5), r"context_lens: expected shape \[2\]"),
    ("context_lens", lambda b: int32(5, 21), r"context_lens\[1\]: expected at most .* 20.*got 21"),
    ("context_lens", lambda b: int32(4, 20), r"context_lens\[0\]"),
    ("context_lens", lambda b: int32(5, -20), r"context_lens\[1\]"),
    ("page_table", lambda b: b.page_table.long(), "page_table: expected torch.int32"),
    ("page_table", lambda b: b.page_table[0], "page_table: expected shape"),
    ("page_table", lambda b: b.page_table[:1], "page_table: expected shape"),
    ("page_table", lambda b: b.page_table[:, :1], "page_table: expected 2 columns"),
    ("page_table", lambda b: torch.tensor([[3, 0], [1, -1]]).int(), r"page_table\[1, 1\]"),
    ("page_table", lambda b: torch.tensor([[2, 0], [1, 2]]).int(), "that nobody else holds|slots"),
    ("page_table", lambda b: int32(3, 0, 1, 2).view(2, 2).T.contiguous().T, "contiguous last"),
    ("slots", lambda b: b.slots.int(), "slots: expected torch.int64"),
    ("slots", lambda b: b.slots[:-1], r"slots: expected shape \[6\]"),
    ("slots", lambda b: b.slots + 1, r"slots\[0\]: expected 48, or -1"),
    ("slots", lambda b: b.slots - 1000, r"slots\[0\]"),
    ("slots", lambda b: b.slots + 2**40, r"slots\[0\]"),
    ("positions", lambda b: b.positions.int(), "positions: expected torch.int64"),
    ("positions", lambda b: b.positions[1:], "positions: expected shape"),
    ("positions", lambda b: b.positions + 1, r"positions\[0\]: expected 0"),
    ("positions", lambda b: -b.positions, r"positions\[1\]: expected 1"),
    ("page_size", lambda b: 0, "page_size: expected at least 1"),
    ("page_size", lambda b: -16, "page_size"),
    ("page_size", lambda b: 8, "page_table: expected 3 columns"),
    ("page_size", lambda b: 32, "slots"),
    ("page_size", lambda b: 16.0, "page_size: expected whole numbers"),
    ("query_lens", lambda b: (5,), "host_context_lens: expected 1"),
    ("query_lens", lambda b: (5, 2), "query_starts: |query_starts|slots: expected shape"),
    ("query_lens", lambda b: (-5, 11), r"query_lens\[0\]"),
    ("query_lens", lambda b: (6, 0), r"query_lens\[0\]"),
    ("query_lens", lambda b: (5, math.nan), "query_lens: expected whole numbers"),
    ("host_context_lens", lambda b: (5, 19), r"context_lens\[1\]"),
    ("host_context_lens", lambda b: (5, 0), r"query_lens\[1\]"),
    ("host_context_lens", lambda b: (5, 2**31), r"query_lens\[1\]"),
    ("host_context_lens", lambda b: (5, 70), "page_table: expected 5 columns"),
    ("exact", lambda b: ExactPlan(b.exact.page_table.long(), b.exact.slots), "exact.page_table"),
    ("exact", lambda b: ExactPlan(b.exact.page_table[:1], b.exact.slots), "exact.page_table"),
    ("exact", lambda b: ExactPlan(b.exact.page_table[:, :1], b.exact.slots), "2 columns"),
    ("exact", lambda b: ExactPlan(b.exact.page_table - 1, b.exact.slots), r"exact.page_table\[0"),
    ("exact", lambda b: ExactPlan(b.exact.page_table - 2, b.exact.slots), r"exact.page_table\[0"),
    ("exact", lambda b: ExactPlan(b.exact.page_table, b.exact.slots.int()), "exact.slots"),
    ("exact", lambda b: ExactPlan(b.exact.page_table, b.exact.slots[1:]), "exact.slots"),
    ("exact", lambda b: ExactPlan(b.exact.page_table, b.exact.slots + 1), r"exact.slots\[0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "change", "message"), PLANS)
def test_a_plan_that_cannot_be_is_not_built(field, change, message):
    good = plan()
    with pytest.raises(ValueError, match=message):
        replace(good, **{field: change(good)})


LISTS = [
    ({"query_lens": [5.5, 1]}, "query_lens: expected whole numbers"),
    ({"query_lens": [-1, 1]}, r"query_lens\[0\]"),
    ({"context_lens": [5, math.nan]}, "context_lens: expected whole numbers"),
    ({"context_lens": [5, 2**31]}, r"context_lens\[1\]"),
    ({"page_tables": [[3], [1, 2.0]]}, r"page_tables\[1\]: expected whole numbers"),
    ({"page_tables": [[3], [1, 2**31]]}, r"page_tables\[1\]: expected page ids"),
    ({"page_tables": [[3], [1, -1]]}, r"page_tables\[1\]: expected page ids of at least 0"),
    ({"page_tables": [[3], [1, 1]]}, "that nobody else holds"),
    ({"page_tables": [[2], [1, 2]]}, "that nobody else holds"),
    ({"page_size": 0}, "page_size"),
    ({"exact_tables": [[0]]}, "exact_tables: expected 2, one a request"),
    ({"exact_tables": [[0], [1]]}, r"exact_tables\[1\]: expected 2 pages"),
    ({"exact_tables": [[0], [1, -1]]}, r"exact.page_table\[1, 1\]"),
    ({"exact_tables": [[0], [-1, 2]]}, r"exact.page_table\[1, 0\]"),
    ({"exact_tables": [[2], [1, 2]]}, "that nobody else holds"),
]


@pytest.mark.parametrize(("change", "message"), LISTS)
def test_lists_that_are_no_step_are_refused(change, message):
    good = {
        "query_lens": [5, 1],
        "context_lens": [5, 20],
        "page_tables": [[3], [1, 2]],
        "page_size": PAGE,
        "exact_tables": [[0], [1, 2]],
    }
    plan_batch(**good)
    with pytest.raises(ValueError, match=message):
        plan_batch(**good | change)


QUERIES = [
    ({"q": rows(5)}, r"q: expected \[6 tokens, q_heads, 64\]"),
    ({"q": rows(7)}, r"q: expected \[6 tokens"),
    ({"q": rows(width=32)}, r"q: expected .*got \(6, 4, 32\)"),
    ({"q": rows(width=128)}, r"q: expected .*128"),
    ({"q": rows(heads=5)}, "q: expected a multiple of 2 kv_heads"),
    ({"q": rows(heads=1)}, "q: expected a multiple of 2 kv_heads"),
    ({"q": rows(heads=0)}, "q: expected a multiple of 2 kv_heads"),
    ({"q": rows()[0]}, "q: expected"),
    ({"q": rows(dtype=torch.int8)}, "q: expected a floating dtype, got torch.int8"),
    ({"q": torch.empty(6, HEADS, WIDTH, device="meta").half()}, "q: expected it on cpu"),
    ({"batch": plan(exact=None)}, "batch.exact: expected a plan"),
    ({"batch": plan_batch([5, 1], [5, 20], [[8], [1, 2]], PAGE, exact_tables=[[0], [1, 2]])},
     "page ids below 8, the layer's pages, got 8"),
    ({"batch": plan_batch([5, 1], [5, 20], [[0], [9999, 2]], PAGE, exact_tables=[[0], [1, 2]])},
     "page ids below 8, the layer's pages, got 9999"),
    ({"batch": plan_batch([5, 1], [5, 20], [[3], [1, 2]], PAGE, exact_tables=[[8], [1, 2]])},
     "page ids below 8, its exact pages, got 8"),
    ({"batch": plan_batch([5, 1], [5, 20], [[3], [1]], 32, exact_tables=[[0], [1]])},
     "batch.page_size: expected 16"),
    ({"batch": derive(plan(), page_table=plan().page_table.to("meta"))}, "batch: expected it on"),
    ({"sinks": torch.zeros(2)}, "sinks: expected 4 logits"),
    ({"sinks": torch.zeros(8)}, "sinks: expected 4 logits"),
    ({"sinks": torch.zeros(4, device="meta")}, "sinks: expected them on cpu"),
    ({"mask": masks.RowIntervals(torch.zeros(3, 1, 5, 1, 2).int())}, "mask: expected 1 or 2 req"),
    ({"mask": masks.RowIntervals(torch.zeros(1, 4, 5, 1, 2).int())}, "mask: expected 1 or 2 kv_"),
    ({"mask": masks.ColumnIntervals(torch.full((1, 4, 20, 1), 20).int())}, "1 or 2 kv_heads"),
]  # fmt: skip


@pytest.mark.parametrize("implementation", ATTENDS)
@pytest.mark.parametrize(("change", "message"), QUERIES)
def test_attention_that_cannot_be_right_is_refused(implementation, change, message):
    """Through the op and through the implementation itself."""
    change = dict(change)
    params = INTERVALS if implementation.target.split(".")[-1].count("mask") else A
    for name in ("sinks", "mask"):
        if name in change:
            params = replace(params, **{name: change.pop(name)})
    given = {"q": rows(), "layer": layer_of(), "batch": plan()} | change
    with pytest.raises(ValueError, match=message):
        attend_op.attend(**given, params=params, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        implementation.load()(given["q"], given["layer"], given["batch"], params)


KEYS = [
    ({"k": rows(5, KV)}, "k: expected"),
    ({"k": rows(6, 4)}, r"k: expected \[6 tokens, 2, 64\]"),
    ({"k": rows(6, KV, 32)}, "k: expected"),
    ({"v": rows(6, 1)}, "v: expected"),
    ({"v": rows(5, KV)}, "v: expected"),
    ({"v": rows(6, KV, 128)}, "v: expected"),
    ({"v": rows(6, KV, dtype=torch.int32)}, "v: expected a floating dtype"),
    ({"q": rows(6, 3)}, "q: expected a multiple of 2"),
    ({"q": rows(1)}, "q: expected"),
    ({"batch": plan(exact=None)}, "batch.exact: expected a plan"),
    ({"batch": plan_batch([5, 1], [5, 20], [[3], [1, 8]], PAGE, exact_tables=[[0], [1, 2]])},
     "page ids below 8"),
    ({"params": WriteParams(rope_table(19, WIDTH))}, "rope: expected at least 20 positions"),
    ({"params": WriteParams(rope_table(64, 128))}, "rope: expected at most 64 rotated"),
    ({"params": WriteParams(rope_table(64, 64, device="meta"))}, "params: expected tensors on"),
    ({"params": WriteParams(norm=QKNorm(torch.ones(32), torch.ones(32)))}, "norm: expected 64"),
    ({"params": WriteParams(bias=(torch.ones(4, 64), torch.ones(4, 64), torch.ones(2, 64)))},
     "bias of k"),
    ({"params": WriteParams(bias=(torch.ones(2, 64), torch.ones(2, 64), torch.ones(2, 64)))},
     "bias of q"),
    ({"params": WriteParams(bias=(torch.ones(4, 64), torch.ones(2, 64), torch.ones(1, 64)))},
     "bias of v"),
]  # fmt: skip


@pytest.mark.parametrize("implementation", WRITES)
@pytest.mark.parametrize(("change", "message"), KEYS)
def test_a_write_that_cannot_be_right_writes_nothing(implementation, change, message):
    layer = layer_of()
    before = [each.clone() for each in planes(layer)]
    given = {"q": rows(), "k": rows(6, KV), "v": rows(6, KV), "batch": plan(), "params": W} | change
    with pytest.raises(ValueError, match=message):
        implementation.load()(
            given["q"], given["k"], given["v"], layer, given["batch"], given["params"]
        )
    assert all(torch.equal(*each) for each in zip(before, planes(layer), strict=True))


TABLES = [
    (int64(1, 2), 33, "page_table: expected 3 pages for 33 tokens, got 2"),
    (int64(1, 8), 20, "page_table: expected page ids from 0 to 7, got 8"),
    (int64(1, -1), 20, "page_table: expected page ids from 0 to 7, got -1"),
    (int32(1, 2)[None], 20, "page_table: expected int32 or int64"),
    (torch.tensor([1.0, 2.0]), 20, "page_table: expected int32 or int64"),
    (int64(1, 2), -1, "context_len"),
    (int64(1, 2), 20.0, "context_len"),
    (int64(1, 2).to("meta"), 20, "page_table: expected it on cpu"),
]


@pytest.mark.parametrize("implementation", GATHERS)
@pytest.mark.parametrize(("table", "context", "message"), TABLES)
def test_a_gather_that_cannot_be_right_is_refused(implementation, table, context, message):
    with pytest.raises(ValueError, match=message):
        implementation.load()(layer_of().key, table, context, torch.float32)
    with pytest.raises(ValueError, match="dtype: expected a floating"):
        implementation.load()(layer_of().key, int64(1, 2), 20, torch.int32)


def test_an_id_past_the_context_is_nobodys_business():
    check_gather(layer_of().key, int64(1, 2, 999), 20, torch.float32)
    plan_batch([1], [20], [[1, 2, 999]], PAGE)


def wide(shape, dtype, last=False):
    return torch.zeros(*shape[:-1], shape[-1] * 2, dtype=dtype)[..., :: 2 if last else 1]


CODE_SHAPE = (PAGES, KV, PAGE, WIDTH)
SPEC = QuantSpec(CODES["int8"])
GROUPS = QuantSpec(CODES["int8"], Granularity(16))
STATIC = QuantSpec(CODES["int8"], dynamic=False)
GOOD = torch.zeros(CODE_SHAPE, dtype=torch.int8)
SCALE = torch.zeros(*CODE_SHAPE[:3], 1, dtype=torch.float16)
VIEWS = [
    (SPEC, wide(CODE_SHAPE, torch.int8, True), SCALE, "codes: expected contiguous last two"),
    (SPEC, wide(CODE_SHAPE, torch.int8)[..., :WIDTH], SCALE, "codes: expected contiguous last two"),
    (SPEC, torch.zeros(PAGES, PAGE, KV, WIDTH, dtype=torch.int8).transpose(1, 2), SCALE, "codes"),
    (SPEC, GOOD[:1].expand(CODE_SHAPE), SCALE, "codes: expected pages at least 1024"),
    (SPEC, GOOD[:, :1].expand(CODE_SHAPE), SCALE, "codes: expected kv_heads at least 1024"),
    (SPEC, GOOD.view(torch.uint8), SCALE, "codes: expected torch.int8 for code int8"),
    (SPEC, GOOD.half(), SCALE, "codes: expected torch.int8"),
    (QuantSpec(CODES["none"]), GOOD, None, "codes: expected the dtype of a model"),
    (SPEC, GOOD[0], SCALE, "codes: expected"),
    (SPEC, GOOD[:, :0], SCALE[:, :0], "each but pages at least 1"),
    (SPEC, GOOD, SCALE.float(), "scale: expected torch.float16 for dynamic int8"),
    (SPEC, GOOD, SCALE[:7], "scale: expected"),
    (SPEC, GOOD, SCALE.to("meta"), "scale: expected it on cpu"),
    (SPEC, GOOD, torch.zeros(8, 2, 32, 1).half()[:, :, ::2], "scale: expected contiguous last two"),
    (GROUPS, GOOD, wide((8, 2, 16, 4), torch.float16, True), "scale: expected contiguous last"),
    (STATIC, GOOD, torch.zeros(2, 1, dtype=torch.int32), "scale: expected torch.float16 or"),
]


@pytest.mark.parametrize(("spec", "codes", "scale", "message"), VIEWS)
def test_a_view_that_no_kernel_reads_right_is_not_built(spec, codes, scale, message):
    with pytest.raises(ValueError, match=message):
        QuantizedPages(spec, codes, scale)


def test_static_scales_are_read_in_their_order_however_they_lie():
    spec = QuantSpec(CODES["int8"], Granularity(1), dynamic=False)
    scale = torch.rand(WIDTH, KV) + 0.1
    pages = QuantizedPages(spec, GOOD, scale.T)
    assert pages.scale.is_contiguous() and torch.equal(pages.scale, scale.T)


def test_halves_and_exact_pages_that_do_not_belong_together_are_no_layer():
    good = layer_of()
    for change, message in (
        ({"exact_value": None}, "exact_value: expected a tensor as exact_key"),
        ({"exact_key": None}, "exact_key: expected a tensor as exact_value"),
        ({"exact_key": good.exact_key[..., :32]}, "exact_key: expected"),
        ({"exact_key": good.exact_key[:, :1]}, "exact_key: expected"),
        ({"exact_value": good.exact_value[:3]}, "exact_value: expected"),
        ({"exact_value": good.exact_value.float()}, "exact_value: expected the dtype"),
        ({"exact_key": good.exact_key[..., ::2].repeat(1, 1, 1, 2).mT.contiguous().mT},
         "exact_key: expected contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            replace(good, **change)


PARAMS = [
    (lambda: AttendParams(math.nan), "softmax_scale"),
    (lambda: AttendParams(None), "softmax_scale"),
    (lambda: AttendParams(0.1, softcap="5"), "softcap"),
    (lambda: AttendParams(0.1, sinks=[0.0, 1.0]), "sinks"),
    (lambda: AttendParams(math.inf), "softmax_scale"),
    (lambda: AttendParams(-0.1), "softmax_scale"),
    (lambda: AttendParams(0.0), "softmax_scale"),
    (lambda: AttendParams(0.1, softcap=0.0), "softcap"),
    (lambda: AttendParams(0.1, softcap=-50.0), "softcap"),
    (lambda: AttendParams(0.1, softcap=math.nan), "softcap"),
    (lambda: AttendParams(0.1, sinks=torch.zeros(4, 1)), "sinks"),
    (lambda: AttendParams(0.1, sinks=torch.zeros(4).int()), "sinks"),
    (lambda: AttendParams(0.1, "causal"), "mask: expected a Mask, got str"),
    (lambda: AttendParams(0.1, masks.CausalMask(2**70)), "mask.window"),
    (lambda: AttendParams(0.1, masks.CausalMask(5, 2**31)), "mask.sink_tokens"),
    (lambda: QKNorm(torch.ones(64), torch.ones(32)), "k_weight: expected 64"),
    (lambda: QKNorm(torch.ones(1, 64), torch.ones(64)), "q_weight"),
    (lambda: QKNorm(torch.ones(64), torch.ones(64), eps=math.nan), "eps"),
    (lambda: QKNorm(torch.ones(64), torch.ones(64), eps=-1e-6), "eps"),
    (lambda: RopeTable(torch.ones(8, 4), torch.ones(7, 4)), r"sin: expected \(8, 4\)"),
    (lambda: RopeTable(torch.ones(8), torch.ones(8)), "cos: expected float32"),
    (lambda: RopeTable(torch.ones(8, 4).bfloat16(), torch.ones(8, 4).bfloat16()), "cos: expected"),
    (lambda: rope_table(0, 64), "max_positions"),
    (lambda: rope_table(8, 64, theta=math.nan), "theta"),
    (lambda: WriteParams(bias=(torch.ones(2, 64), torch.ones(2, 64))), "bias: expected three"),
    (lambda: WriteParams(bias=(torch.ones(64),) * 3), "bias of q"),
    (lambda: Call(device_info("cpu"), FORMATS["int8"], torch.float32, 5, 2, 64, 64, 16), "q_heads"),
    (lambda: Call(device_info("cpu"), FORMATS["int8"], torch.float32, 4, 0, 64, 64, 16), "kv_hea"),
]


@pytest.mark.parametrize(("make", "message"), PARAMS)
def test_parameters_that_cannot_be_are_not_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def built(name="int8", dtype=torch.float32, **changes):
    numbers = {
        "q_heads": HEADS,
        "kv_heads": KV,
        "head_dim": WIDTH,
        "value_head_dim": WIDTH,
        "page_size": PAGE,
    }
    call = Call(device_info("cpu"), FORMATS[name], dtype, **numbers | changes)
    return build_attention(find_backend("flash"), masks.CausalMask(), call)


@pytest.mark.parametrize(
    ("attention", "layer", "params", "message"),
    [
        (built("fp8"), layer_of("int8"), A, "layer: expected pages of format fp8"),
        (built("int4"), layer_of("int4").body(), A, "layer: expected exact pages as int4 has"),
        (built("int8", page_size=32), layer_of("int8"), A, "layer: expected kv_heads, head_dim"),
        (built("int8", head_dim=32), layer_of("int8"), A, "layer: expected kv_heads, head_dim"),
        (built("int8"), layer_of("int8"), INTERVALS, "mask: expected a causal one"),
    ],
)
def test_an_attention_serves_what_it_was_built_for(attention, layer, params, message):
    before = [each.clone() for each in planes(layer)]
    q, k, v = rows(), rows(6, KV), rows(6, KV)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, layer, plan(), W, params)
    with pytest.raises(ValueError, match=message):
        attention.attend_step(q, layer, plan(), params)
    assert all(torch.equal(*each) for each in zip(before, planes(layer), strict=True))


def test_what_attention_refuses_is_not_written_before():
    layer = layer_of("int8")
    wrong = replace(A, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="sinks"):
        built()(rows(), rows(6, KV), rows(6, KV), layer, plan(), W, wrong)
    assert not layer.key.codes.any()


def test_a_view_of_before_its_cache_grew_is_refused():
    cache = PagedKVCache(PAGES)
    cache.add_layer(0, CacheLayout(KV, WIDTH, FORMATS["int8"], PAGE, torch.float32))
    old = cache.layer(0)
    cache.grow(2)
    with pytest.raises(ValueError, match="of before it grew"):
        built()(rows(), rows(6, KV), rows(6, KV), old, plan(), W, A)
    built()(rows(), rows(6, KV), rows(6, KV), cache.layer(0), plan(), W, A)


def test_a_step_is_checked_once_and_again_when_somebody_writes_to_it():
    attention, layer, batch = built(), layer_of("int8"), plan()
    q, k, v = rows(), rows(6, KV), rows(6, KV)
    attention(q, k, v, layer, batch, W, A)
    kept = set(batch.passed)
    attention(q, k, v, layer, batch, W, A)
    assert kept and batch.passed == kept
    batch.page_table[1, 1] = 9999
    with pytest.raises(ValueError, match=r"slots|page ids below 8"):
        attention(q, k, v, layer, batch, W, A)
    with torch.inference_mode():
        # Nobody counts writes to these: they are looked at every time.
        made = replace(plan(), page_table=plan().page_table.clone())
        attention(q, k, v, layer, made, W, A)
        made.page_table[1, 0] = -7
        with pytest.raises(ValueError, match=r"page_table\[1, 0\]"):
            attention.attend_step(q, layer, made, A)


def test_on_a_device_numbers_are_checked_when_that_is_asked():
    # As a plan made by hand on a GPU: the host knows none of its numbers.
    batch = derive(plan(), page_table=plan().page_table + 500, largest_page=None)
    with pytest.raises(ValueError, match="slots"):
        batch.check_values()
    good = derive(plan(), largest_page=None)
    good.check_values()
    assert good.largest_page == 3
    with pytest.raises(ValueError, match="page ids from 0 to 7, got 500"):
        check_gather(layer_of().key, int64(500), 5, torch.float32, read_back=True)


FIELDS = ("query_starts", "context_lens", "page_table", "slots", "positions")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*FIELDS, "exact.page_table", "exact.slots"]),
    st.integers(0, 5),
    st.sampled_from([-(2**31), -17, -2, -1, 0, 1, 2, 3, 4, 7, 8, 16, 48, 2**31 - 1]),
    st.sampled_from(["int8", "int4"]),
)
def test_any_number_in_a_plan_is_right_or_refused(field, at, number, name):
    """Written over in place: refused, or the answer that the reference gives to the same plan."""
    attention, layer = built(name), layer_of(name)
    oracle = layer_of(name)
    torch.manual_seed(0)
    q, k, v = (rows(6, heads, dtype=torch.float32) for heads in (HEADS, KV, KV))
    batch = plan()
    holder = batch.exact if field.startswith("exact") else batch
    tensor = getattr(holder, field.removeprefix("exact.")).view(-1)
    tensor[at % len(tensor)] = number
    try:
        out, _ = attention(q, k, v, layer, batch, W, A)
    except ValueError:
        return
    written = write_reference.rope_write(q, k, v, oracle, batch, W)
    wanted, _ = reference.attend(written.q.double(), oracle, batch, A)
    if oracle.value.spec.rotation == "hadamard":
        wanted = rotate(wanted)
    # The core rounds weights to a code's width; another page is off by 100 times that.
    torch.testing.assert_close(out.double(), wanted, atol=1e-2, rtol=0)
