"""What kernel benches measure on, made on a CPU: a step that holds, and the truth that gates it."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.bench.cases import Case, exact_output, last_queries, make_batch, make_layer
from quantpage.formats import FORMATS
from quantpage.masks import causal_document
from quantpage.ops.attend import AttendParams, attend, reference
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("new", [1, 5, 16])
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "k8v4", "int8_static"])
def test_the_gate_of_the_decode_bench_is_the_reference(name, new):
    torch.manual_seed(0)
    case = Case(3, 96, (name,), new=new, q_heads=4, kv_heads=2, head_dim=32, page_size=16)
    layer = make_layer(case, name, "cpu")
    batch = make_batch(case, layer.exact_key is not None, "cpu")
    assert (batch.exact is None) == (FORMATS[name].exact_pages is None)
    # Tables and slots are those of the same lists.
    exact = None if batch.exact is None else batch.exact.page_table.tolist()
    listed = plan_batch([new] * 3, [96] * 3, batch.page_table.tolist(), 16, exact_tables=exact)
    assert torch.equal(batch.slots, listed.slots)
    assert torch.equal(batch.positions, listed.positions)
    q = torch.randn(3 * new, 4, 32, dtype=torch.float64)
    found = exact_output(q, layer, batch, 0.2)
    wanted, _ = reference.attend(q, layer, batch, AttendParams(0.2))
    torch.testing.assert_close(found, wanted[-new:], atol=1e-9, rtol=1e-9)


def test_the_last_queries_of_a_step_are_those_of_the_whole():
    mask = causal_document([30, 40])
    case = cached("int8", [70], dtype=torch.float32)
    q, batch = case.step([(0, 70)])
    params = AttendParams(0.2, mask)
    whole, _ = attend(q.float(), case.layer, batch, params, "torch")
    tail, _ = attend(q[-13:].float(), case.layer, last_queries(batch, 13), params, "torch")
    torch.testing.assert_close(tail, whole[-13:], atol=1e-5, rtol=1e-5)
