"""A step over exact pages, in parts and in working pages, answers and leaves what a whole one does.

On a GPU with kernels, where there is one.
"""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from quantpage.batch import BatchPlan, derive, plan_batch
from quantpage.integrations.vllm_plugin.parts import Part, parts_of
from quantpage.integrations.vllm_plugin.working import most_pages, plan_working
from tests.integrations.vllm_plugin.layer_cases import (
    DEVICES,
    PAGE,
    Layer,
)


def in_working(plan: BatchPlan, table: Tensor) -> list[Part]:
    over, working = plan_working(plan, table)
    return [Part(slice(0, plan.num_tokens), over, working)]


def same(got: Tensor, wanted: Tensor) -> bool:
    """Exactly where the same code ran; kernels of decode and prefill add in other orders."""
    if got.device.type == "cpu":
        return torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)
    return True


@pytest.mark.parametrize("device", DEVICES)
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
@pytest.mark.parametrize(
    ("how", "name"),
    [("working", "k8v4"), ("parts", "k8v4"), ("parts", "int4_near8"), ("working", "int3")],
)
def test_steps_answer_as_over_pages_that_are_all_kept(how, name, cuts, device):
    """Three steps, the later ones reading what the earlier ones kept."""
    torch.manual_seed(0)
    requests, width = len(cuts[0]), 40
    tables = [[1 + r * width + p for p in range(width)] for r in range(requests)]
    whole, sparse = (Layer(1 + requests * width, device, name) for _ in range(2))
    lengths = [0] * requests
    for news in cuts:
        contexts = [length + new for length, new in zip(lengths, news, strict=True)]
        plan = plan_batch(news, contexts, tables, PAGE, device)
        given = whole.numbers(sum(news))
        # What vLLM holds: the first page, and those that the next token sees; a page of before too.
        kept = torch.tensor(tables, dtype=torch.int32)
        for row, length, context, new in zip(kept, lengths, contexts, news, strict=True):
            row[1 : max(length // PAGE - 1, 1)].zero_()
            if how == "working" or new > 256:
                row[length // PAGE + 1 : max(context // PAGE - 1, 1)].zero_()
        kept = kept.to(device)
        wanted = whole.whole(plan, given)
        parts = in_working(plan, kept) if how == "working" else parts_of(plan, kept, plan.slots)
        assert same(sparse.run(parts, given), wanted)
        for part in parts:
            most = most_pages(sum(news), requests, PAGE)
            assert part.working is None or part.working.count <= most
        lengths = contexts


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_reads_a_page_that_another_writes_in_the_same_step(device):
    torch.manual_seed(0)
    one, other = Layer(60, device), Layer(60, device)
    # The second request begins with the first one's 32 tokens, which come in this step.
    tables = [[1, 2, 3, 4], [1, 2, 5, 6]]
    news, contexts = (64, 20), (64, 52)
    plan = plan_batch((64,), (64,), tables[:1], PAGE, device)
    both = derive(
        plan,
        query_starts=torch.tensor([0, *accumulate(news)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        page_table=torch.tensor(tables, dtype=torch.int32, device=device),
        slots=torch.arange(16, 100, device=device),
        positions=torch.tensor([*range(64), *range(32, 52)], device=device),
        query_lens=news,
        host_context_lens=contexts,
    )
    given = one.numbers(84)
    wanted = one.whole(both, given)
    got = other.run(in_working(both, both.page_table), given)
    assert same(got, wanted) and got.isfinite().all()


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("news", "rows"),
    [
        ((1, 5, 16), [(0, 22)]),
        ((1, 17, 256), [(0, 1), (1, 274)]),
        ((1, 2, 17, 257, 300), [(0, 3), (3, 20), (20, 577)]),
        ((300, 1), [(0, 301)]),
        ((20, 1), [(0, 21)]),
    ],
)
def test_parts_of_a_step(news, rows):
    tables = [[1 + r * 20 + p for p in range(20)] for r in range(len(news))]
    plan = plan_batch(news, news, tables, PAGE)
    parts = parts_of(plan, plan.page_table, torch.cat([plan.slots, plan.slots]))
    assert [(part.rows.start, part.rows.stop) for part in parts] == rows
    for part in parts:
        assert (part.working is not None) == (part.plan.max_query_len > 256)
        assert part.plan.query_starts.tolist() == [0, *accumulate(part.plan.query_lens)]
        assert torch.equal(part.plan.slots, plan.slots[part.rows])
