"""An engine's layer through the operator: compiled whole, checked by torch, the same numbers."""

import gc

import pytest
import torch
from torch import nn

import quantpage
from quantpage.batch import plan_batch

pytestmark = pytest.mark.cpu

PAGE, WIDTH, Q_HEADS, KV_HEADS = 16, 32, 4, 2


class Layer(nn.Module):
    """Projections around attention, as engines write them."""

    def __init__(self, cache, index, step):
        super().__init__()
        torch.manual_seed(index)
        hidden = Q_HEADS * WIDTH
        self.qkv = nn.Linear(hidden, (Q_HEADS + 2 * KV_HEADS) * WIDTH)
        self.o = nn.Linear(hidden, hidden)
        layout = quantpage.CacheLayout(
            KV_HEADS, WIDTH, quantpage.FORMATS["int8"], PAGE, torch.float32
        )
        cache.add_layer(index, layout)
        call = quantpage.Call(
            quantpage.device_info("cpu"), layout.format, torch.float32, Q_HEADS, KV_HEADS, WIDTH,
            WIDTH, PAGE,
        )  # fmt: skip
        self.attention = quantpage.BoundAttention(
            quantpage.build_attention("flash", quantpage.CausalMask(), call),
            lambda: cache.layer(index),
            quantpage.WriteParams(),
            quantpage.AttendParams(WIDTH**-0.5),
            step,
        )

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(1, (-1, WIDTH)).split([Q_HEADS, KV_HEADS, KV_HEADS], 1)
        return x + self.o(self.attention(q, k, v).flatten(1))


class Engine:
    def __init__(self):
        self.step = quantpage.CurrentStep()
        self.cache = quantpage.PagedKVCache(pages=8)
        self.model = nn.Sequential(*(Layer(self.cache, index, self.step) for index in range(2)))
        self.lengths = [0, 0]

    @torch.no_grad()
    def forward(self, model, new):
        self.lengths = [have + more for have, more in zip(self.lengths, new, strict=True)]
        self.step.batch = plan_batch(new, self.lengths, [[3, 0, 5], [1, 7, 2]], PAGE)
        noise = torch.Generator().manual_seed(sum(self.lengths))
        return model(torch.randn(sum(new), Q_HEADS * WIDTH, generator=noise))


STEPS = [(20, 33), (1, 1), (1, 1), (3, 0)]


def test_a_compiled_model_is_one_graph_and_says_the_same():
    eager, compiled = Engine(), Engine()
    torch._dynamo.reset()
    graphs = []

    def seen(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    run = torch.compile(compiled.model, fullgraph=True, dynamic=True, backend=seen)
    for new in STEPS:
        wanted = eager.forward(eager.model, new)
        torch.testing.assert_close(compiled.forward(run, new), wanted, atol=1e-5, rtol=1e-5)
    # Prompts, decodes and mixed steps: no step was compiled for itself.
    assert len(graphs) == 1
    assert sum("attention_step" in each for each in graphs[0]) == 2


def test_what_torch_asks_of_an_operator():
    engine = Engine()
    engine.forward(engine.model, (20, 33))
    engine.step.batch = plan_batch([1, 1], [21, 34], [[3, 0, 5], [1, 7, 2]], PAGE)
    q, k, v = (torch.randn(2, heads, WIDTH) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    given = (q, k, v, torch.empty(2, Q_HEADS, WIDTH), engine.model[0].attention.number)
    asked = torch.library.opcheck(torch.ops.quantpage.attention_step.default, given)
    assert set(asked.values()) == {"SUCCESS"} and len(asked) >= 4
    with pytest.raises(Exception, match=r"Argument out is not defined to alias|mutat"):
        _check_an_operator_that_hides_a_write(given)


def _check_an_operator_that_hides_a_write(given):
    """The checks can fail: the same operator that does not own up to ``out``."""
    with torch.library._scoped_library("quantpage_tests", "FRAGMENT") as library:
        library.define("hidden(Tensor q, Tensor k, Tensor v, Tensor out, int number) -> ()")
        library.impl("hidden", torch.ops.quantpage.attention_step, "CPU")
        torch.library.register_fake("quantpage_tests::hidden", lambda *_: None, lib=library)
        torch.library.opcheck(
            torch.ops.quantpage_tests.hidden.default, given, test_utils=("test_schema",)
        )


def test_the_operator_is_what_eager_code_does():
    one, other = Engine(), Engine()
    for engine in (one, other):
        engine.step.batch = plan_batch([20, 3], [20, 3], [[3, 0, 5], [1, 7, 2]], PAGE)
    q, k, v = (torch.randn(23, heads, WIDTH) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    out = torch.full((23, Q_HEADS, WIDTH), 7.0)
    layer = one.model[0].attention
    assert layer(q, k, v, out) is out
    through = torch.empty_like(out)
    number = other.model[0].attention.number
    torch.ops.quantpage.attention_step(q, k, v, through, number)
    assert torch.equal(out, through)
    assert torch.equal(one.cache.layer(0).key.codes, other.cache.layer(0).key.codes)
    assert torch.equal(layer(q, k, v), out)


def test_a_step_that_is_missing_or_does_not_fit_writes_nothing():
    engine = Engine()
    layer = engine.model[0].attention
    q, k, v = (torch.randn(5, heads, WIDTH) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    with pytest.raises(RuntimeError, match="expected a batch to be set before the forward"):
        layer(q, k, v)
    engine.step.batch = plan_batch([5], [5], [[3]], PAGE)
    before = engine.cache.layer(0).key.codes.clone()
    with pytest.raises(ValueError, match="out: expected"):
        layer(q, k, v, torch.empty(4, Q_HEADS, WIDTH))
    with pytest.raises(ValueError, match="k: expected"):
        layer(q, k[:4], v)
    assert torch.equal(engine.cache.layer(0).key.codes, before)


def test_a_layer_that_is_gone_says_so():
    engine = Engine()
    number = engine.model[0].attention.number
    q, k, v = (torch.randn(5, heads, WIDTH) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    del engine
    gc.collect()
    with pytest.raises(RuntimeError, match=f"got number {number}, whose BoundAttention is gone"):
        torch.ops.quantpage.attention_step(q, k, v, torch.empty_like(q), number)
