"""Kernels that random steps ask for and the warm-up does not, planned for an H100 without one."""

import json
import random
import sys

import torch
from triton.runtime import driver

from quantpage.attention import build_attention, find_backend
from quantpage.batch import BatchPlan, derive, plan_batch
from quantpage.cache import CacheLayout
from quantpage.cache.cells import cell_bytes, exact_cell_bytes, layer_of_cells
from quantpage.formats import find_format
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.triton import ahead
from quantpage.warm_up import Asked, Sizes, WarmUp, plan_like
from tests.kernels.ahead_case import Driver

HEADS, WIDTH, PAGE, TABLE = 8, 128, 64, 256
H100 = DeviceInfo("cuda", "H100", (9, 0), 132, 227 << 10)
SIZES = Sizes(requests=34, tokens=600, context=9000)
NEWS = (*[1] * 8, 2, 3, 5, 8, 12, 16, 17, 20, 31, 33, 60, 100, 128, 150, 255, 257, 300, 500)


def pretend() -> None:
    """Tensors of this machine are an H100's, and nothing is compiled of what is asked for."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("quantpage."):
            continue
        for asked, answer in (
            ("device_info", H100),
            ("processors_of", H100.processors),
        ):
            if hasattr(module, asked):
                setattr(module, asked, lambda device, answer=answer: answer)
        if hasattr(module, "rotate_output"):
            module.rotate_output = lambda out: out
    ahead._Later.run = lambda self, device: [each.set_result(None) for each, _ in self._jobs]
    driver.set_active(Driver())


def random_step(draw: random.Random, like: BatchPlan, exact: bool) -> BatchPlan:
    """Of what a server of SIZES may have."""
    few = draw.choice((1, 2, 5, SIZES.requests))
    news = sorted(draw.choice(NEWS) for _ in range(draw.randint(1, few)))
    while sum(news) > SIZES.tokens:
        news.pop()
    longest = draw.choice((1, 300, 2000, SIZES.context))
    contexts = tuple(draw.randint(new, max(new, longest)) for new in news)
    return plan_like(like, tuple(news), contexts, exact)


def missing(name: str, group: int, window: int | None) -> tuple[int, list[str]]:
    """How many kernels the warm-up asks for, and steps that ask for more."""
    form, dtype, mask = find_format(name), torch.bfloat16, CausalMask(window=window)
    layout = CacheLayout(HEADS, WIDTH, form, PAGE, dtype)
    cells = torch.zeros(1, HEADS, cell_bytes(layout), dtype=torch.uint8)
    exact = None
    if form.exact_pages is not None:
        exact = torch.zeros(1, HEADS, exact_cell_bytes(layout), dtype=torch.uint8)
    view = layer_of_cells(cells, layout, None, exact)
    call = Call(H100, form, dtype, group * HEADS, HEADS, WIDTH, WIDTH, PAGE)
    attention = build_attention(find_backend("flash"), mask, call)
    for each in (attention.write, attention.prefill, attention.decode):
        each.load()
    pretend()
    params, draw, found = AttendParams(0.1, mask), random.Random(group), []
    table = torch.zeros(1, TABLE, dtype=torch.int32)
    like = derive(plan_batch((1,), (1,), [[0]], PAGE), page_table=table)
    with ahead.compile_ahead() as count:
        assert count is not None
        WarmUp(view.device, count).ask(Asked(attention, view, params, like), SIZES)
        warm = known = count()
        for _ in range(200):
            plan = random_step(draw, like, exact is not None)
            q, k, v = (
                torch.zeros(plan.num_tokens, heads, WIDTH, dtype=dtype)
                for heads in (group * HEADS, HEADS, HEADS)
            )
            written = attention.write_step(q, k, v, view, plan, WriteParams()).q
            out = torch.empty_like(q)
            attention.attend_step(written, view, plan, params, lse_wanted=False, out=out)
            if count() > known:
                found.append(f"{plan.query_lens} of {plan.host_context_lens}")
                known = count()
    return warm, found


def main() -> None:
    """As JSON."""
    cases = ("int8", 4, None), ("k8v4", 5, None), ("int4", 2, 1024)
    print(json.dumps({name: missing(name, *more) for name, *more in cases}))


if __name__ == "__main__":
    main()
