"""Kernels write where they are told, and no log-sum-exp where nobody reads it."""

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import DEVICE, HOPPER, TIER, Step, make_step

# isort: split
from quantpage.formats import FORMATS
from quantpage.masks import CausalMask, document
from quantpage.ops.attend import CANDIDATES, AttendParams, attend
from quantpage.ops.attend.prefill import ways
from tests.ops.segment_cases import make_segments

pytestmark = TIER
BY_TARGET = {each.target.removeprefix("quantpage.ops.attend."): each for each in CANDIDATES}
DECODES = Step((1, 2, 0, 1), (70, 33, 20, 150), head_dim=64)
PROMPTS = Step((40, 1, 20), (40, 90, 60), kv_heads=1, group=2, head_dim=64)
CASES = [
    ("decode.triton:attend", CausalMask(), DECODES),
    ("decode.gluon:attend", CausalMask(), Step((1, 2), (70, 33), head_dim=128)),
    ("prefill.triton:attend", CausalMask(), PROMPTS),
    ("prefill.gluon:attend", CausalMask(), PROMPTS),
    ("interval.triton:attend", document([150]), PROMPTS),
    ("interval.triton:attend", document([150]), DECODES),
    ("interval.gluon:attend", document([150]), PROMPTS),
]


@pytest.mark.parametrize("form", ["int8", "int8_exact"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("target", "mask", "step"), CASES)
def test_attention_goes_where_it_is_told(target, mask, step, sinks, form, monkeypatch):
    if "gluon" in target and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    # So that the longest prompt takes a workspace.
    monkeypatch.setitem(ways.WORKSPACE_ROWS, "triton", 64)
    ways.choose_ways.cache_clear()
    given = FORMATS[form]
    if given.exact_pages is None:
        q, layer, batch = make_step(given.key, given.value, step, mask)
    else:
        q, layer, batch = make_segments(given, step, mask)
    tokens, heads, width = q.shape
    sink = torch.randn(heads, device=DEVICE) if sinks else None
    call = (q, layer, batch, AttendParams(width**-0.5, mask, sinks=sink), BY_TARGET[target])
    wanted, lse = attend(*call)
    assert lse is not None
    memory = torch.full((tokens + 2, heads + 2, width + 8), 7.0, dtype=q.dtype, device=DEVICE)
    strided = memory[1:-1, 1:-1, :width]
    whole = torch.full((tokens, heads, width), 7.0, dtype=q.dtype, device=DEVICE)
    # With and without sinks: each memory with the log-sum-exp and without it.
    with_lse, without = (strided, whole) if sinks else (whole, strided)
    made, own = attend(*call, out=with_lse)
    assert made is with_lse
    assert torch.equal(made, wanted) and torch.equal(own, lse)
    made, none = attend(*call, out=without, lse_wanted=False)
    assert made is without and none is None
    assert torch.equal(made, wanted)
    strided.fill_(7.0)
    assert bool((memory == 7).all())
    ways.choose_ways.cache_clear()


@pytest.mark.parametrize(("target", "mask", "step"), CASES)
def test_a_whole_result_takes_no_memory_besides(target, mask, step, monkeypatch):
    """Into contiguous memory a kernel writes itself: no result is copied."""
    if "gluon" in target and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    given = FORMATS["int8"]
    q, layer, batch = make_step(given.key, given.value, step, mask)
    out = torch.empty(*q.shape, dtype=q.dtype, device=DEVICE)
    run = BY_TARGET[target].load()
    made, lse = run(q, layer, batch, AttendParams(0.1, mask), out=out, lse_wanted=False)
    assert made is out and lse is None
