"""What kernel benches measure on, made on a CPU: a step that holds, and the truth that gates it."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import derive, plan_batch
from quantpage.bench import latent
from quantpage.bench.cases import (
    CHECKED,
    Case,
    checked_error,
    dense_step,
    expected,
    last_queries,
    make_batch,
    make_layer,
    read_bytes,
    relative_error,
)
from quantpage.bench.write import prompt_step
from quantpage.formats import find_format, rotate
from quantpage.masks import CausalMask, causal_document
from quantpage.ops import gather, rope_write
from quantpage.ops.attend import AttendParams, attend, reference
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu


NAMES = ["none", "int8", "fp8", "int6", "int4", "int4_near8", "k8v4", "int3", "int8_static"]


def step_of(name, new):
    """Three requests of 352 tokens, as the decode bench makes them."""
    torch.manual_seed(0)
    case = Case(3, 352, (name,), new=new, q_heads=4, kv_heads=2, head_dim=32, page_size=16)
    layer = make_layer(case, name, "cpu")
    batch = make_batch(case, layer.exact_key is not None, "cpu")
    return torch.randn(3 * new, 4, 32, dtype=torch.bfloat16), layer, batch


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_requests_of_unlike_lengths_have_pages_of_their_own(name):
    torch.manual_seed(0)
    lengths = (70, 330, 48)
    case = Case(3, 330, new=2, q_heads=4, kv_heads=2, head_dim=32, page_size=16, lengths=lengths)
    assert make_layer(case, name, "cpu").key.codes.shape[0] == 5 + 21 + 3
    batch = make_batch(case, name == "int4", "cpu")
    owned = [row[: -(-n // 16)] for row, n in zip(batch.page_table, lengths, strict=True)]
    assert sorted(torch.cat(owned).tolist()) == list(range(29))
    assert batch.host_context_lens == lengths and batch.context_lens.tolist() == list(lengths)
    batch.check_values()
    if name == "int4":
        for row, n in zip(batch.exact.page_table, lengths, strict=True):
            last = -(-n // 16) - 1
            assert (row >= 0).nonzero().flatten().tolist() == [0, last - 1, last]
    with pytest.raises(ValueError, match="lengths: expected 2 of up to 330, got 3 of up to 330"):
        Case(2, 330, lengths=lengths)


@pytest.mark.parametrize("name", ["int8", "int4", "int4_near8"])
def test_bytes_of_a_step_are_those_of_keys_that_a_query_sees(name):
    lengths = (70, 336, 48)
    case = Case(3, 336, q_heads=4, kv_heads=2, head_dim=32, page_size=16, lengths=lengths)
    layer = make_layer(case, name, "cpu")
    # Of a key and its value in two kv_heads: codes, and a scale and a zero of 16 bits.
    body = 2 * 2 * {"int8": 32 + 2, "int4": 16 + 4}.get(name.partition("_")[0])
    near = {"int8": body, "int4": 2 * 2 * 64, "int4_near8": 2 * 2 * (32 + 2)}[name]
    kept = (16 + 16 + 6, 48, 48)
    whole = sum(n * near + (length - n) * body for n, length in zip(kept, lengths, strict=True))
    assert read_bytes(layer, case) == whole
    # The first request sees the end of its third page, the second nothing of its first.
    seen, kept = (40, 40, 40), (22, 32, 40)
    less = sum(n * near + (length - n) * body for n, length in zip(kept, seen, strict=True))
    assert read_bytes(layer, replace(case, window=40)) == less
    params = AttendParams(0.2, CausalMask(40))
    batch, q = make_batch(case, name != "int8", "cpu"), torch.randn(3, 4, 32, dtype=torch.bfloat16)
    out = attend(q, layer, batch, params, "torch")
    assert checked_error("right", out, q, layer, batch, params) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_written_fills_its_pages(name):
    torch.manual_seed(0)
    case = Case(1, 100, (name,), q_heads=4, kv_heads=2, head_dim=32, page_size=16)
    layer, batch = prompt_step(case, name, "cpu")
    k, v = torch.randn(2, 100, 2, 32, dtype=torch.bfloat16)
    rope_write.rope_write(None, k, v, layer, batch, rope_write.WriteParams())
    table = batch.page_table[0]
    held = gather.gather(layer.key, table, 100, torch.float32)
    turned = rotate(k.float()) if layer.key.spec.rotation == "hadamard" else k.float()
    assert relative_error(held, turned) < 0.25 or name == "int8_static"
    if layer.exact_key is not None:
        near = gather.gather(layer.exact().key, batch.exact.page_table[0], 100, torch.float32)
        assert relative_error(near, turned) < 0.01


@pytest.mark.parametrize(
    ("name", "new"), [*((name, new) for name in NAMES for new in (1, 5, 16)), ("int8", 40)]
)
def test_what_a_bench_expects_is_the_reference(name, new):
    q, layer, batch = step_of(name, new)
    assert (batch.exact is None) == (find_format(name).exact_pages is None)
    # Tables and slots are those of the same lists.
    exact = None if batch.exact is None else batch.exact.page_table.tolist()
    table = batch.page_table.tolist()
    listed = plan_batch([new] * 3, [352] * 3, table, 16, exact_tables=exact)
    assert torch.equal(batch.slots, listed.slots)
    assert torch.equal(batch.positions, listed.positions)
    found = expected(q, layer, batch, AttendParams(0.2))
    last = min(new, CHECKED)
    for got, wanted in zip(
        (found.want, found.want_lse),
        reference.attend(q.double(), layer, batch, AttendParams(0.2)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted[-last:], atol=1e-9, rtol=1e-9)


# Random near pages in int8 outweigh the codes behind them.
@pytest.mark.parametrize("name", [each for each in NAMES if each != "int4_near8"])
def test_a_bench_times_what_is_right_and_nothing_else(name):
    q, layer, batch = step_of(name, 2)
    params = AttendParams(0.2)
    out, lse = attend(q, layer, batch, params, "torch")
    assert checked_error("right", (out, lse), q, layer, batch, params) < 1e-2
    assert checked_error("right", (out, None), q, layer, batch, params) < 1e-2
    # Two pages in each other's place, which causal attention sees by their exact pages alone.
    table = batch.page_table.clone()
    table[:, 5], table[:, 9] = batch.page_table[0, 9], batch.page_table[0, 5]
    wrong = attend(q, layer, derive(batch, page_table=table), params, "torch")
    for got in (wrong, (wrong[0], None), (torch.full_like(out, torch.nan), None)):
        with pytest.raises(ValueError, match=r"1 x 4k: (output|log-sum-exp): error"):
            checked_error("1 x 4k", got, q, layer, batch, params)
    with pytest.raises(ValueError, match=r"log-sum-exp: error"):
        checked_error("1 x 4k", (out, lse + 1), q, layer, batch, params)


def test_dense_rows_are_a_layer_of_pages():
    torch.manual_seed(1)
    k, v = (torch.randn(2, 192, 32, dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(4, 4, 32, dtype=torch.bfloat16)
    layer, batch = dense_step(k, v, 4)
    assert layer.key.codes.data_ptr() == k.data_ptr()
    seen = torch.ones(4, 192).tril(188).bool()
    rows = q.transpose(0, 1).double(), k.double(), v.double()
    wanted = torch.nn.functional.scaled_dot_product_attention(*rows, seen, enable_gqa=True)
    found = expected(q, layer, batch, AttendParams(32**-0.5))
    torch.testing.assert_close(found.want, wanted.transpose(0, 1))


@pytest.mark.parametrize("new,context", [(1, 70), (5, 70), (70, 70)])
def test_operations_over_latent_rows_are_those_of_pairs_that_are_seen(new, context):
    case = Case(3, context, new=new, q_heads=4, kv_heads=1, head_dim=512)
    seen = torch.ones(new, context).tril(context - new).sum().item()
    # A row of 512 and 64 by the query, and 512 by its probability.
    assert latent.operations(case) == 2 * 3 * 4 * (576 + 512) * seen


def test_the_last_queries_of_a_step_are_those_of_the_whole():
    mask = causal_document([30, 40])
    case = cached("int8", [70], dtype=torch.float32)
    q, batch = case.step([(0, 70)])
    params = AttendParams(0.2, mask)
    whole, _ = attend(q.float(), case.layer, batch, params, "torch")
    tail, _ = attend(q[-13:].float(), case.layer, last_queries(batch, 13), params, "torch")
    torch.testing.assert_close(tail, whole[-13:], atol=1e-5, rtol=1e-5)
