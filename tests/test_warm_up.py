"""Kernels are launched in all sizes before the first request, and no page is changed."""

import random
from dataclasses import replace

import pytest
import torch

from quantpage import warm_up
from quantpage.attention import build_attention, find_backend
from quantpage.batch import derive, plan_batch
from quantpage.formats import KeyMap
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.warm_up import Asked, Sizes
from tests.integrations.vllm_plugin.layer_cases import DEVICES, ON_GPU, PAGE, PARAMS, Layer


@pytest.mark.pure
def test_sizes_of_a_server():
    steps = list(Sizes(requests=6, tokens=100, context=300).steps())
    assert len(steps) == len(set(steps))
    assert {len(news) for news, _ in steps} == {1, 2, 3, 4, 5, 6}
    assert {context for news, context in steps if news == (1,)} == {64, 96, 128, 192, 256, 300}
    few = {news for news, _ in steps if max(news) <= 16}
    assert few == {(new,) * n for new in range(1, 17) for n in range(1, 7) if new * n <= 100}
    chunks = {news: context for news, context in steps if max(news) > 16}
    beside = {(1, 32), (17, 32), (32, 32), (1, 64), (17, 64)}
    assert chunks.keys() == {(32,), (64,), (100,)} | beside
    for news, context in steps:
        assert sum(news) <= 100 and max(news) <= context <= 300
    drafts = [news for news, _ in Sizes(2, 100, 300, drafts=3).steps()]
    assert (4, 4) in drafts and (1, 1) in drafts
    alone = [news for news, _ in Sizes(1, 16, 16).steps()]
    assert (1,) in alone and all(len(news) == 1 for news in alone)


def ask(layer, sizes):
    with warm_up.warm_up(layer.view.device) as warm:
        return warm.ask(layer, sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["int8", "k8v4", "int4_near8"])
def test_nothing_is_written(name, device):
    layer = Layer(4, device, name)
    codes = [half.codes.clone() for half in (layer.view.key, layer.view.value)]
    pool = None if layer.pool is None else layer.pool.clone()
    like = plan_batch((1,), (40,), [[1, 2, 3]], PAGE, device)
    sizes = Sizes(requests=2, tokens=40, context=40)
    warm_up._DONE.clear()
    steps = ask(Asked(layer.attention, layer.view, PARAMS, like), sizes)
    every = len(list(sizes.steps()))
    # Compiled kernels are launched by the first step that asks for them; interpreted ones by all.
    assert steps == every if device == "cpu" else 0 < steps < every
    for half, wanted in zip((layer.view.key, layer.view.value), codes, strict=True):
        assert torch.equal(half.codes, wanted)
    assert pool is None or torch.equal(layer.pool, pool)
    # A layer of the same kind has nothing left to compile, one with a window has.
    assert ask(Asked(layer.attention, layer.view, PARAMS, like), sizes) == 0
    window = AttendParams(PARAMS.softmax_scale, CausalMask(window=20))
    assert ask(Asked(layer.attention, layer.view, window, like), sizes) > 0


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["mean", "feedback", "turn"])
def test_what_a_key_map_has_asks_for_kernels_of_its_own(name):
    layer = Layer(4, "cpu", "int4")
    like = plan_batch((1,), (40,), [[1, 2, 3]], PAGE, "cpu")
    ones = torch.ones(layer.view.kv_heads, layer.view.key.head_dim)
    plane = ones if name == "mean" else torch.diag_embed(ones)
    kinds = {
        Asked(layer.attention, replace(layer.view, key_map=each), PARAMS, like).kind()
        for each in (None, KeyMap(ones), KeyMap(2 * ones), KeyMap(ones, **{name: plane}))
    }
    assert len(kinds) == 3


@pytest.mark.parametrize("name", [pytest.param("int4", marks=ON_GPU)])
def test_no_memory_is_kept_from_pages(name):
    """vLLM counts what is gone when its first steps are over, and makes fewer pages for it."""
    layer = Layer(4, "cuda", name)
    like = plan_batch((1,), (40,), [[1, 2, 3]], PAGE, "cuda")
    warm_up._DONE.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert ask(Asked(layer.attention, layer.view, PARAMS, like), Sizes(8, 512, 4096)) > 0
    assert torch.cuda.memory_reserved() - before < 2**26


@pytest.mark.parametrize("name", [pytest.param(each, marks=ON_GPU) for each in ("int8", "int4")])
def test_what_is_compiled_ahead_answers_as_torch_does(name):
    from quantpage.ops.triton.ahead import compile_ahead

    params = AttendParams(PARAMS.softmax_scale, softcap=30.0)
    layer, other = Layer(16, "cuda", name), Layer(16, "cuda", name)
    other.attention = build_attention(
        find_backend("flash"), CausalMask(), other.attention.call, "torch"
    )
    plan = plan_batch((70, 1), (90, 33), [[*range(1, 7)], [*range(7, 10)]], PAGE, "cuda")
    given = layer.numbers(90 + 33)
    before = plan_batch((90, 33), (90, 33), [[*range(1, 7)], [*range(7, 10)]], PAGE, "cuda")
    now = [each[20:91] for each in given]
    with compile_ahead() as count:
        layer.whole(before, given, params)
        layer.whole(plan, now, params)
        assert count is not None and count() > 0
        assert not layer.view.key.codes.any()
    seen = []
    knobs = _runtime_knobs()
    for step, numbers in ((before, given), (plan, now)):
        knobs.jit_post_compile_hook = lambda **named: seen.append(named["repr"])
        try:
            got = layer.whole(step, numbers, params)
        finally:
            knobs.jit_post_compile_hook = None
        assert not seen
        wanted = other.whole(step, numbers, params)
        torch.testing.assert_close(got, wanted, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("name", [pytest.param(each, marks=ON_GPU) for each in ("int8", "int4")])
def test_no_step_of_a_warm_server_compiles(name):
    layer, draw = Layer(4, "cuda", name), random.Random(0)
    like = derive(
        plan_batch((1,), (40,), [[1, 2, 3]], PAGE, "cuda"),
        page_table=torch.zeros(1, 64, dtype=torch.int32, device="cuda"),
    )
    sizes = Sizes(requests=5, tokens=300, context=1000)
    warm_up._DONE.clear()
    ask(Asked(layer.attention, layer.view, PARAMS, like), sizes)
    seen = []
    knobs = _runtime_knobs()
    knobs.jit_post_compile_hook = lambda **named: seen.append(named["repr"])
    try:
        for _ in range(100):
            news = sorted(
                draw.choice((1, 1, 3, 16, 17, 60, 150)) for _ in range(draw.randint(1, 5))
            )
            while sum(news) > sizes.tokens:
                news.pop()
            contexts = tuple(draw.randint(new, sizes.context) for new in news)
            plan = warm_up.plan_like(like, tuple(news), contexts, layer.pool is not None)
            given = layer.numbers(plan.num_tokens)
            layer.attention.attend_step(
                layer.write(plan, given, layer.view), layer.view, plan, PARAMS, lse_wanted=False,
                out=torch.empty_like(given[0]),
            )  # fmt: skip
            assert not seen, (news, contexts)
    finally:
        knobs.jit_post_compile_hook = None


def _runtime_knobs():
    import triton

    return triton.knobs.runtime
