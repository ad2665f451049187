"""Every kernel that steps of a server ask for is one that the warm-up has launched: decode's
launches, planned for an H100 without one."""

import random

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, LayerKV
from quantpage.cache.cells import cell_bytes, exact_cell_bytes, layer_of_cells
from quantpage.formats import find_format
from quantpage.hardware import DeviceInfo
from quantpage.integrations.vllm_plugin.warm_up import Sizes, plan_like
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.decode import gluon, triton
from quantpage.ops.attend.results import Results
from quantpage.ops.dispatch import DECODE_TOKENS

pytestmark = pytest.mark.pure
HEADS, WIDTH, PAGE = 8, 128, 64
H100 = DeviceInfo("cuda", "H100", (9, 0), 132, 50 << 20, 227 << 10)


class Launches:
    """Stands for a kernel: what it is compiled for, launch by launch."""

    def __init__(self, name: str, seen: set) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return lambda *given, **fixed: self.seen.add((self.name, *fixed.items()))


@pytest.fixture
def seen(monkeypatch):
    """Kernels that decode on an H100 launches, each with all that it is compiled for."""
    seen = set()
    for module in (triton, gluon):
        monkeypatch.setattr(module, "device_info", lambda device: H100)
    for module, kernel in (
        (triton, "decode_kernel"),
        (triton, "merge_cuts_kernel"),
        (gluon, "decode_kernel"),
        (gluon, "drafts_kernel"),
    ):
        name = f"{module.__name__}.{kernel}"
        monkeypatch.setattr(module, kernel, Launches(name, seen))
    monkeypatch.setattr(triton, "processors_of", lambda device: H100.processors)
    monkeypatch.setattr(triton, "workspace", lambda device, sizes: (torch.empty(0),) * 3)
    monkeypatch.setattr(triton, "counters_of", lambda device, count: torch.empty(0))
    monkeypatch.setattr(gluon, "copied", lambda pages, tile: pages)
    return seen


def pages(name: str) -> LayerKV:
    """A page of cells as vLLM would hold them."""
    layout = CacheLayout(HEADS, WIDTH, find_format(name), PAGE, torch.bfloat16)
    cells = torch.zeros(1, HEADS, cell_bytes(layout), dtype=torch.uint8)
    exact = None
    if layout.format.exact_pages is not None:
        exact = torch.zeros(1, HEADS, exact_cell_bytes(layout), dtype=torch.uint8)
    return layer_of_cells(cells, layout, None, exact)


@pytest.mark.parametrize(
    ("name", "group", "window"),
    [("int8", 4, None), ("k8v4", 5, None), ("int4", 2, 1024)],
)
def test_steps_of_a_server_ask_for_nothing_else(seen, name, group, window):
    draw = random.Random(group)
    view, mask = pages(name), CausalMask(window=window)
    like = plan_batch((1,), (1,), [[1]], PAGE)
    sizes = Sizes(requests=34, tokens=600, context=9000)

    params = AttendParams(0.1, mask)

    def launched(news, contexts):
        seen.clear()
        plan = plan_like(like, news, contexts, view.exact_key is not None)
        shape = plan.num_tokens, group * HEADS, WIDTH
        q, out = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
        gluon.decode_into(Results(out, None), q, view, plan, params)
        return set(seen)

    warm = set()
    for news, context in sizes.steps():
        if max(news) <= DECODE_TOKENS:
            warm |= launched(news, (context,) * len(news))
    assert len(warm) > 20 and len({name for name, *_ in warm}) >= 3
    for _ in range(100):
        requests = draw.randint(1, sizes.requests)
        news = [1] * requests
        for _ in range(draw.randint(0, 2)):
            news[draw.randrange(requests)] = draw.randint(1, DECODE_TOKENS)
        longest = draw.choice((20, 300, 4000, sizes.context))
        contexts = [draw.randint(new, max(new, longest)) for new in news]
        missing = launched(tuple(news), tuple(contexts)) - warm
        assert not missing, (news, contexts, missing)
