"""Kernels are compiled before the first request, not during it.

Triton compiles a kernel when it is first launched with arguments of a kind: a second or more, in
which every request of a server waits. So the first layer of each kind runs steps of all sizes when
vLLM runs its own first steps at the start: writes that write nowhere (slot -1), attention to the
null page. Which sizes ask for a kernel of their own the planners know, and a launch that asks for
none costs microseconds, so that the sizes are simply powers of two, of contexts the middles between
too; of the few new tokens that decode's kernels take, all. On a GPU the steps run twice: first
nothing is launched, and what they ask for is compiled side by side (``ops/triton/ahead``); then
those run that asked for something. Compiled kernels stay in Triton's cache on disk: the next start
loads them.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quantpage.attention import LayerAttention
from quantpage.batch import BatchPlan, ExactPlan, derive
from quantpage.cache import LayerKV
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import DECODE_TOKENS
from quantpage.ops.rope_write import WriteParams

_WRITE = WriteParams()
_DONE: set[Hashable] = set()
_LONG = 4
"""Times a chunk is the context before which it stands here, beside none and the longest."""

_MANY = 1 << 21
"""Tokens of all contexts from which on no planner tells steps of few rows apart."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What steps a server will have."""

    requests: int
    """Most in a step."""
    tokens: int
    """Most new ones in a step."""
    context: int
    """Longest."""
    drafts: int = 0
    """New tokens of a decoding request beside the one."""

    def steps(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """New tokens of each request, and the context of all."""
        contexts = sorted({*_powers(64, self.context), *_powers(96, self.context)})
        # The end of a prompt may be as few tokens, beside requests that decode.
        for new in range(1, max(min(DECODE_TOKENS, self.tokens), 1 + self.drafts) + 1):
            most = min(self.requests, max(self.tokens // new, 1))
            # One more than a power is the first that a planner's next vector holds.
            for requests in sorted({*_powers(1, most), *(n + 1 for n in _powers(2, most - 1))}):
                for context in contexts:
                    if context == contexts[0] or requests * context <= _MANY:
                        yield (new,) * requests, max(context, new)
        for chunk in _powers(32, min(self.tokens, self.context)):
            contexts = sorted({chunk, min(_LONG * chunk, self.context), self.context})
            for context in contexts:
                yield (chunk,), context
            # Beside a request that decodes, beside the shortest prompt, and beside another.
            for beside in {1, DECODE_TOKENS + 1, chunk}:
                if self.requests > 1 and beside + chunk <= self.tokens:
                    yield from (((beside, chunk), each) for each in contexts[1:] or contexts)


def warm_up(
    attention: LayerAttention,
    view: LayerKV,
    params: AttendParams,
    like: BatchPlan,
    sizes: Sizes,
) -> int:
    """Launch what a layer's steps will launch; the number of steps that it took, 0 where a layer of
    the same kind has done it in this process.

    view: pages, of which the first is read and none is written. like: a step of the engine, whose
    tables' strides others will have.
    """
    call, device = attention.call, view.device
    kind = call, params.facts, params.softcap is None, view.facts, sizes
    if kind in _DONE:
        return 0
    _DONE.add(kind)

    def run(news: tuple[int, ...], context: int) -> None:
        plan = plan_like(like, news, (context,) * len(news), view.exact_key is not None)
        q, k, v = (
            torch.zeros(plan.num_tokens, heads, width, dtype=call.dtype, device=device)
            for heads, width in (
                (call.q_heads, call.head_dim),
                (call.kv_heads, call.head_dim),
                (call.kv_heads, call.value_head_dim),
            )
        )
        written = attention.write_step(q, k, v, view, plan, _WRITE).q
        assert written is not None
        out = torch.empty_like(q[..., : call.value_head_dim])
        attention.attend_step(written, view, plan, params, lse_wanted=False, out=out)

    steps = [*sizes.steps()]
    if device.type == "cuda":
        from quantpage.ops.triton.ahead import compile_ahead

        with compile_ahead() as count:
            if count is not None:
                steps = [step for step in steps if _grows(count, run, step)]
    for step in steps:
        run(*step)
    if device.type == "cuda":
        # Else what steps of so many sizes worked in is taken for memory that graphs need, and is
        # not there for pages.
        torch.cuda.empty_cache()
    return len(steps)


def _grows(
    count: Callable[[], int],
    run: Callable[[tuple[int, ...], int], None],
    step: tuple[tuple[int, ...], int],
) -> bool:
    """Run a step; whether it raised the count."""
    before = count()
    run(*step)
    return count() > before


def plan_like(
    like: BatchPlan, news: tuple[int, ...], contexts: tuple[int, ...], exact: bool
) -> BatchPlan:
    """A step over the null page that writes nothing.

    exact: of pages beside which exact ones are kept.
    """
    device, tokens, requests = like.device, sum(news), len(news)

    def filled(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    width = max(like.page_table.shape[1], -(-max(contexts) // like.page_size))
    table = filled(0, torch.int32, requests, width)
    slots = filled(-1, torch.int64, tokens)
    return derive(
        like,
        query_starts=torch.tensor([0, *accumulate(news)], dtype=torch.int32).to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32).to(device),
        page_table=table,
        slots=slots,
        positions=filled(0, torch.int64, tokens),
        query_lens=news,
        host_context_lens=contexts,
        exact=ExactPlan(table, slots) if exact else None,
        first_pages=None,
    )


def _powers(least: int, most: int) -> list[int]:
    """``least``, twice that, and so on below ``most``, and ``most``."""
    found = []
    while least < most:
        found.append(least)
        least *= 2
    return [*found, most] if most > 0 else []
