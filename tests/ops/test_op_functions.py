"""The ops as functions: they choose by themselves, write where they are told, or say why not."""

import pytest
import torch

import quantpage
from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cpu_core import absence
from quantpage.errors import NoImplementation
from quantpage.formats import FORMATS, KeyMap
from quantpage.masks import CausalMask, causal_document
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu

PAGE, WIDTH = 16, 32
HERE = ["torch"] if absence() else ["torch", "cpu"]
PARAMS = quantpage.AttendParams(WIDTH**-0.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))


@pytest.fixture(params=["none", "int8", "int4"])
def case(request):
    return cached(request.param, [40, 29], dtype=torch.float32)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("mask", [CausalMask(window=17), causal_document([30, 20])])
@pytest.mark.parametrize("model_basis", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_attention_goes_where_it_is_told(case, name, mask, model_basis, strided):
    q, batch = case.step([(20, 40), (28, 29)])
    q = q.float()
    params = quantpage.AttendParams(WIDTH**-0.5, mask, sinks=PARAMS.sinks)
    given = (q, case.layer, batch, params, name, model_basis)
    wanted, lse = quantpage.attend(*given)
    memory = torch.full((23, 6, WIDTH + 8), 7.0)
    out = memory[1:22, 1:5, :WIDTH] if strided else torch.full((21, 4, WIDTH), 7.0)
    made, own = quantpage.attend(*given, out=out)
    assert made is out
    assert torch.equal(out, wanted)
    assert torch.equal(own, lse)
    if strided:
        out.fill_(7.0)
        assert bool((memory == 7).all())
    again, none = quantpage.attend(*given, lse_wanted=False)
    assert none is None
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("sinks", [PARAMS.sinks, None])
def test_a_mean_that_keys_lack_changes_no_way_out(name, sinks):
    """Its part of the scores is added to the log-sum-exp, before sinks enter."""
    cache = PagedKVCache(pages=4)
    noise = torch.Generator().manual_seed(2)
    mean = torch.randn(2, WIDTH, generator=noise)
    layout = CacheLayout(2, WIDTH, FORMATS["int8"], PAGE, torch.float32)
    cache.add_layer(0, layout, key_map=KeyMap(torch.ones(2, WIDTH), mean))
    batch = plan_batch([33], [33], [[2, 0, 3]], PAGE)
    q, k, v = (torch.randn(33, heads, WIDTH, generator=noise) for heads in (4, 2, 2))
    written = quantpage.rope_write(q, k, v, cache.layer(0), batch, quantpage.WriteParams(), name)
    params = quantpage.AttendParams(WIDTH**-0.5, sinks=sinks)
    given = (written.q, cache.layer(0), batch, params, name)
    wanted, _ = quantpage.attend(*given)
    out = torch.empty(33, 4, WIDTH)
    made, lse = quantpage.attend(*given, lse_wanted=False, out=out)
    assert made is out and lse is None
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (
            torch.empty(20, 4, WIDTH),
            r"out: expected \(21, 4, 32\), a row a query, got",
        ),
        (
            torch.empty(21, 4, WIDTH).half(),
            "out: expected torch.float32 as the queries, got",
        ),
        (torch.empty(21, WIDTH, 4).mT, "out: expected a contiguous last dimension, got strides"),
        (
            torch.empty(21, 4, WIDTH, device="meta"),
            "out: expected it on cpu as the queries, got",
        ),
        ("q", "out: expected memory of its own, got that of the queries"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(case, out, said):
    q, batch = case.step([(20, 40), (28, 29)])
    q = q.float()
    before = q.clone()
    with pytest.raises(ValueError, match=said):
        quantpage.attend(q, case.layer, batch, PARAMS, out=q if isinstance(out, str) else out)
    assert torch.equal(q, before)


def test_ops_choose_by_themselves(case):
    q, batch = case.step([(20, 40), (28, 29)])
    q = q.float()
    first = HERE[-1]
    assert torch.equal(
        quantpage.attend(q, case.layer, batch, PARAMS)[0],
        quantpage.attend(q, case.layer, batch, PARAMS, first)[0],
    )
    table = batch.page_table[0]
    rows = [quantpage.gather(case.layer.key, table, 40, torch.float32, by) for by in (None, first)]
    assert torch.equal(*rows)
    k, v = (torch.randn(21, 2, WIDTH) for _ in range(2))
    written = [
        quantpage.rope_write(q, k, v, case.layer, batch, quantpage.WriteParams(), by).q
        for by in (None, first)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("op", ["attend", "rope_write", "gather"])
def test_a_name_is_never_replaced(case, op):
    q, batch = case.step([(20, 40), (28, 29)])
    q = q.float()
    k = torch.randn(21, 2, WIDTH)
    given = {
        "attend": (q, case.layer, batch, PARAMS),
        "rope_write": (q, k, k, case.layer, batch, quantpage.WriteParams()),
        "gather": (case.layer.key, batch.page_table[0], 40, torch.float32),
    }[op]
    run = getattr(quantpage, op)
    with pytest.raises(NoImplementation, match="triton: needs a CUDA device, got cpu"):
        run(*given, "triton")
    with pytest.raises(ValueError, match=r"implementation: expected one of .*torch; got 'tritium'"):
        run(*given, "tritium")


def test_what_an_op_chose_is_looked_up(case, monkeypatch):
    q, batch = case.step([(39, 40), (28, 29)])
    quantpage.attend(q.float(), case.layer, batch, PARAMS)

    def refuse(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr("quantpage.ops.dispatch.choose", refuse)
    quantpage.attend(q.float(), case.layer, batch, PARAMS)
