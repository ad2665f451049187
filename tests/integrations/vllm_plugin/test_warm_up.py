"""Kernels are launched in all sizes before the first request, and no page is changed."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.integrations.vllm_plugin import warm_up
from quantpage.integrations.vllm_plugin.warm_up import Sizes
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from tests.integrations.vllm_plugin.test_parts import DEVICES, PAGE, PARAMS, Layer


@pytest.mark.pure
def test_sizes_of_a_server():
    steps = list(Sizes(requests=6, tokens=100, context=300).steps())
    assert len(steps) == len(set(steps))
    assert {len(news) for news, _ in steps} == {1, 2, 3, 4, 5, 6}
    assert {context for news, context in steps if news == (1,)} == {64, 96, 128, 192, 256, 300}
    few = {news for news, _ in steps if max(news) <= 16}
    assert few == {(new,) * n for new in range(1, 17) for n in range(1, 7) if new * n <= 100}
    chunks = {news: context for news, context in steps if max(news) > 16}
    assert chunks.keys() == {(32,), (64,), (100,), (1, 32), (1, 64), (32, 32)}
    for news, context in steps:
        assert sum(news) <= 100 and max(news) <= context <= 300
    drafts = [news for news, _ in Sizes(2, 100, 300, drafts=3).steps()]
    assert (4, 4) in drafts and (1, 1) in drafts
    alone = [news for news, _ in Sizes(1, 16, 16).steps()]
    assert (1,) in alone and all(len(news) == 1 for news in alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["int8", "k8v4", "int4_near8"])
def test_nothing_is_written(name, device):
    layer = Layer(4, device, name)
    codes = [half.codes.clone() for half in (layer.view.key, layer.view.value)]
    pool = None if layer.pool is None else layer.pool.clone()
    like = plan_batch((1,), (40,), [[1, 2, 3]], PAGE, device)
    sizes = Sizes(requests=2, tokens=40, context=40)
    warm_up._DONE.clear()
    steps = warm_up.warm_up(layer.attention, layer.view, PARAMS, like, sizes)
    assert steps == len(list(sizes.steps()))
    for half, wanted in zip((layer.view.key, layer.view.value), codes, strict=True):
        assert torch.equal(half.codes, wanted)
    assert pool is None or torch.equal(layer.pool, pool)
    # A layer of the same kind has nothing left to compile, one with a window has.
    assert warm_up.warm_up(layer.attention, layer.view, PARAMS, like, sizes) == 0
    window = AttendParams(PARAMS.softmax_scale, CausalMask(window=20))
    assert warm_up.warm_up(layer.attention, layer.view, window, like, sizes) == steps
