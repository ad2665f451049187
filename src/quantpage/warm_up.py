"""Kernels are compiled before the first request, not during it.

Triton compiles a kernel when it is first launched with arguments of a kind: a second or more, in
which every request of a server waits. So before its first request the first layer of each kind runs
steps of all sizes: writes that write nowhere (slot -1), attention to the first page. Which sizes
ask for a kernel of their own the planners know, and a launch that asks for none costs microseconds,
so that the sizes are simply powers of two, of contexts of requests that decode the middles between
too; of the few new tokens that decode's kernels take, all. On a GPU the steps run twice: first
nothing is launched, and what they ask for is compiled side by side (``ops/triton/ahead``); then
those run that asked for something. Compiled kernels stay in Triton's cache on disk: the next start
loads them.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
        every = sorted({*_powers(64, self.context), *_powers(96, self.context)})
        # Of more than a token a request no planner looks as closely.
        few = _powers(64, self.context, 8)
        # The end of a prompt may be as few tokens, beside requests that decode.
        for new in range(1, max(min(DECODE_TOKENS, self.tokens), 1 + self.drafts) + 1):
            most = min(self.requests, max(self.tokens // new, 1))
            # One more than a power is the first that a planner's next vector holds.
            for requests in sorted({*_powers(1, most), *(n + 1 for n in _powers(2, most - 1))}):
                for context in every if new == 1 else few:
                    if context == every[0] or requests * context <= _MANY:
                        yield (new,) * requests, max(context, new)
        for chunk in _powers(32, min(self.tokens, self.context)):
            contexts = sorted({chunk, min(_LONG * chunk, self.context), self.context})
            for context in contexts:
                yield (chunk,), context
            # Beside a request that decodes, beside the shortest prompt, and beside another.
            for beside in {1, DECODE_TOKENS + 1, chunk}:
                if self.requests > 1 and beside + chunk <= self.tokens:
                    yield from (((beside, chunk), each) for each in contexts[1:] or contexts)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A layer, and what an engine calls it with."""

    attention: LayerAttention
    view: LayerKV
    """Pages, of which the first is read and none is written."""
    params: AttendParams
    like: BatchPlan
    """A step of the engine, whose tables' strides others will have."""

    def kind(self) -> Hashable:
        """What layers share that ask for the same kernels."""
        view, params, mapped = self.view, self.params, self.view.key_map
        bare = None
        if mapped is not None:
            bare = tuple(each is None for each in (mapped.mean, mapped.feedback, mapped.turn))
        return self.attention.call, params.facts, params.softcap is None, view.facts, bare

    @torch.inference_mode()
    def run(self, news: tuple[int, ...], context: int) -> None:
        """A step of requests that have ``context`` tokens each after it, or nothing where memory
        has no room for what it works in: nor will requests be as long."""
        with suppress(torch.OutOfMemoryError):
            self._run(news, context)

    def _run(self, news: tuple[int, ...], context: int) -> None:
        view, call, facts = self.view, self.attention.call, self.view.facts
        exact = view.exact_key is not None
        plan = plan_like(self.like, news, (context,) * len(news), exact)
        q, k, v = (
            torch.zeros(plan.num_tokens, heads, width, dtype=call.dtype, device=view.device)
            for heads, width in (
                (call.q_heads, facts.query_dim),
                (call.kv_heads, call.head_dim),
                (call.kv_heads, call.value_head_dim),
            )
        )
        written = self.attention.write_step(q, k, v, view, plan, _WRITE).q
        assert written is not None
        out = torch.empty_like(q[..., : facts.out_dim])
        self.attention.attend_step(written, view, plan, self.params, lse_wanted=False, out=out)


@dataclass(slots=True)
class WarmUp:
    """What runs within ``warm_up``."""

    device: torch.device
    count: Callable[[], int] | None
    """Kernels so far; None where launches run as ever."""
    steps: list[tuple[Asked, tuple[tuple[int, ...], int]]] = field(default_factory=list)
    """Those that have to run once more."""

    def ask(self, layer: Asked, sizes: Sizes) -> int:
        """The steps of a layer that are launched, now or when the block ends; 0 where a layer of
        its kind has done it in this process."""
        kind = self.device, layer.kind(), sizes
        if kind in _DONE:
            return 0
        _DONE.add(kind)
        launched = 0
        for step in sizes.steps():
            before = None if self.count is None else self.count()
            layer.run(*step)
            if self.count is None:
                launched += 1
            elif self.count() != before:
                self.steps.append((layer, step))
                launched += 1
        return launched


@contextmanager
def warm_up(device: torch.device) -> Iterator[WarmUp]:
    """What layers are asked within is compiled side by side when the block ends.

    On a GPU the block launches no kernel of ours, whoever calls it: what it computes is noise.
    """
    if device.type != "cuda":
        yield WarmUp(device, None)
        return
    from quantpage.ops.triton.ahead import compile_ahead

    with torch.cuda.device(device):
        with compile_ahead() as count:
            made = WarmUp(device, count)
            yield made
        for layer, step in made.steps:
            layer.run(*step)
        # Else what steps of so many sizes worked in is taken for memory that graphs need, and is
        # not there for pages.
        torch.cuda.empty_cache()


def plan_like(
    like: BatchPlan, news: tuple[int, ...], contexts: tuple[int, ...], exact: bool
) -> BatchPlan:
    """A step over the first page that writes nothing.

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
        query_starts=torch.tensor([0, *accumulate(news)], dtype=torch.int32, device="cpu").to(
            device
        ),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device="cpu").to(device),
        page_table=table,
        slots=slots,
        positions=filled(0, torch.int64, tokens),
        query_lens=news,
        host_context_lens=contexts,
        exact=ExactPlan(table, slots) if exact else None,
        first_pages=None,
    )


def _powers(least: int, most: int, times: int = 2) -> list[int]:
    """``least``, ``times`` that, and so on below ``most``, and ``most``."""
    found = []
    while least < most:
        found.append(least)
        least *= times
    return [*found, most] if most > 0 else []
