"""A step in working pages attends to, and leaves, what it would in pages that are all kept."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from quantpage.attention import build_attention, find_backend
from quantpage.batch import BatchPlan, ExactPlan, derive, plan_batch
from quantpage.cache import CacheLayout, LayerKV
from quantpage.cache.cells import cell_bytes, exact_cell_bytes, layer_of_cells
from quantpage.formats import find_format
from quantpage.hardware import device_info
from quantpage.integrations.vllm_plugin.working import most_pages, plan_working
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams

pytestmark = pytest.mark.cpu
PAGE, HEADS, WIDTH = 16, 2, 32
LAYOUT = CacheLayout(HEADS, WIDTH, find_format("k8v4"), PAGE, torch.float32)
ATTENTION = build_attention(
    find_backend("flash"),
    CausalMask(),
    Call(device_info("cpu"), LAYOUT.format, torch.float32, 4, HEADS, WIDTH, WIDTH, PAGE),
)


class Pool:
    """Cells as vLLM would hold them: page 0 is nobody's."""

    def __init__(self, pages: int) -> None:
        made = torch.randint(0, 99, (pages, HEADS, cell_bytes(LAYOUT)), dtype=torch.uint8)
        near = torch.full((pages, HEADS, exact_cell_bytes(LAYOUT) // 4), torch.nan)
        self.exact = near.view(torch.uint8)
        self.view = layer_of_cells(made, LAYOUT, None, self.exact)


def step(news, contexts, tables) -> BatchPlan:
    plan = plan_batch(news, contexts, tables, PAGE)
    return derive(plan, exact=ExactPlan(plan.page_table, plan.slots))


def attend(plan: BatchPlan, given, view: LayerKV) -> Tensor:
    q, k, v = given
    written = ATTENTION.write_step(q, k, v, view, plan, WriteParams()).q
    return ATTENTION.attend_step(written, view, plan, AttendParams(WIDTH**-0.5)).out


def in_working(plan: BatchPlan, table: Tensor, given, pool: Pool) -> tuple[Tensor, int]:
    plan, working = plan_working(derive(plan, exact=None), table)
    cells, view = working.open(pool.exact, pool.view, LAYOUT)
    q, k, v = given
    q = ATTENTION.write_step(q, k, v, view, plan, WriteParams()).q
    working.keep(cells, pool.exact)
    working.bring(pool.exact, cells)
    out = ATTENTION.attend_step(q, view, plan, AttendParams(WIDTH**-0.5)).out
    return out, working.count


def numbers(tokens: int):
    return [torch.randn(tokens, heads, WIDTH) for heads in (4, HEADS, HEADS)]


@pytest.mark.parametrize(
    "cuts",
    [
        ((40,), (37,), (300,)),
        ((1, 33), (290, 1), (17, 270)),
        ((16, 0), (48, 31), (48, 300)),
        ((15, 260), (1, 16), (257, 2)),
        ((1, 1), (1, 300), (2, 2)),
    ],
)
def test_steps_answer_as_over_pages_that_are_all_kept(cuts):
    """Three steps, the later ones reading what the earlier ones kept."""
    torch.manual_seed(0)
    requests, width = len(cuts[0]), 40
    tables = [[1 + r * width + p for p in range(width)] for r in range(requests)]
    whole, sparse = Pool(1 + requests * width), Pool(1 + requests * width)
    lengths = [0] * requests
    for news in cuts:
        contexts = [length + new for length, new in zip(lengths, news, strict=True)]
        plan, given = step(news, contexts, tables), numbers(sum(news))
        # What vLLM holds: the first page, and those that the next token sees; a page of before too.
        kept = torch.tensor(tables, dtype=torch.int32)
        for row, (length, context) in zip(kept, zip(lengths, contexts, strict=True), strict=True):
            before = max(length // PAGE - 1, 1)
            row[1:before].zero_()
            row[length // PAGE + 1 : max(context // PAGE - 1, 1)].zero_()
        wanted = attend(plan, given, whole.view)
        got, count = in_working(plan, kept, given, sparse)
        assert torch.equal(got, wanted)
        assert count <= most_pages(sum(news), requests, PAGE)
        lengths = contexts


def test_a_request_reads_a_page_that_another_writes_in_the_same_step():
    torch.manual_seed(0)
    pool, other = Pool(60), Pool(60)
    # The second request begins with the first one's 32 tokens, which come in this step.
    tables = [[1, 2, 3, 4], [1, 2, 5, 6]]
    given = numbers(64 + 20)
    news, contexts = (64, 20), (64, 52)
    plan = plan_batch((64,), (64,), tables[:1], PAGE)
    both = derive(
        plan,
        query_starts=torch.tensor([0, *accumulate(news)], dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        page_table=torch.tensor(tables, dtype=torch.int32),
        slots=torch.cat([torch.arange(16, 80), torch.arange(80, 100)]),
        positions=torch.cat([torch.arange(64), torch.arange(32, 52)]),
        query_lens=news,
        host_context_lens=contexts,
    )
    over = derive(both, exact=ExactPlan(both.page_table, both.slots))
    wanted = attend(over, given, pool.view)
    got, _ = in_working(both, both.page_table, given, other)
    assert torch.equal(got, wanted) and got.isfinite().all()
