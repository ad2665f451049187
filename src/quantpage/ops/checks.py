"""One checked entry before every op: a call that cannot be right raises before anything runs.

Every implementation of rope_write, attend and gather stands behind ``writes``, ``attends`` or
``gathers``, so that there is no way in that goes around them: the op functions, the attention of
``build_attention``, an implementation called by hand. Kernels may therefore trust pages, widths and
lengths.

Views, plans and parameters are checked when they are built. Here it is asked whether they belong
together. What was found right is kept in the plan (``BatchPlan.passed``) under what the answer
depends on, so that a step's other layers pay a look-up: about a microsecond. Nothing is read from a
device, except in checked mode.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from quantpage.autocast import in_own_dtypes
from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerFacts, LayerKV, QuantizedPages
from quantpage.hardware import DeviceInfo
from quantpage.ops.dispatch import Phase, call_of, phase_of
from quantpage.ops.refusals import NOTHING, Refusals

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """What one implementation asks of a call besides sense."""

    refusals: Refusals = NOTHING
    """Asked once for calls that are alike."""
    kind: str | None = None
    """'cpu' or 'cuda': whose memory it reads. Tensors on a CPU pass for those of a GPU, as kernels
    can be interpreted there (Triton refuses them elsewhere)."""
    phase: Phase | None = None
    """None: by the most new tokens of a request."""
    host_lengths: bool = False
    """True: runs from ``host_context_lens``, which must not be bounds only."""


ANY = Needs()
P = ParamSpec("P")
Result = TypeVar("Result")


def attends(needs: Needs) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Put an attend function (q, layer, batch, params, ...) behind ``check_attend``."""

    def behind(function: Callable[..., Any]) -> Callable[..., Any]:
        function = in_own_dtypes(function)

        @wraps(function)
        def entered(q: Any, layer: Any, batch: Any, params: Any, *more: Any, **options: Any) -> Any:
            check_attend(q, layer, batch, params, needs)
            return function(q, layer, batch, params, *more, **options)

        entered.needs = needs  # type: ignore[attr-defined]
        return entered

    return behind


def writes(needs: Needs) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Put a rope_write function (q, k, v, layer, batch, params, ...) behind ``check_write``."""

    def behind(function: Callable[..., Any]) -> Callable[..., Any]:
        function = in_own_dtypes(function)

        @wraps(function)
        def entered(
            q: Any, k: Any, v: Any, layer: Any, batch: Any, params: Any, *more: Any, **options: Any
        ) -> Any:
            check_write((q, k, v), layer, batch, params, needs)
            return function(q, k, v, layer, batch, params, *more, **options)

        entered.needs = needs  # type: ignore[attr-defined]
        return entered

    return behind


def gathers(kind: str | None) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Put a gather function (pages, page_table, context_len, dtype, ...) behind ``check_gather``.

    kind: as ``Needs.kind``.
    """

    def behind(function: Callable[..., Any]) -> Callable[..., Any]:
        function = in_own_dtypes(function)

        @wraps(function)
        def entered(
            pages: Any, page_table: Any, context_len: Any, dtype: Any, *more: Any, **options: Any
        ) -> Any:
            check_gather(pages, page_table, context_len, dtype, kind)
            return function(pages, page_table, context_len, dtype, *more, **options)

        return entered

    return behind


def needs_of(function: Callable[..., Any]) -> Needs:
    """What a function behind an entry needs."""
    return getattr(function, "needs", ANY)


def serves(
    function: Callable[..., Any], q: Tensor, layer: LayerKV, phase: Phase, mask: str
) -> bool:
    """Whether a function behind an entry can serve a call like this; looked up."""
    facts = layer.facts
    return not _refused(needs_of(function), facts, q.shape[1], q.dtype, phase, mask)


def unchecked(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function behind its entry, for callers that have passed one with the same arguments."""
    return getattr(function, "__wrapped__", function)


def check_attend(q: Tensor, layer: LayerKV, batch: BatchPlan, params: Any, needs: Needs) -> None:
    """ValueError where attention to ``layer`` cannot be right; see ops/attend for arguments."""
    batch.check_unchanged()
    _check_view("q", q)
    key = (needs, layer.facts, params.facts, q.shape, q.dtype, q.device)
    if key in batch.passed:
        return
    facts, told = layer.facts, params.facts
    q_heads = _check_rows("q", q, batch, facts, None, facts.query_dim)
    if told.checked and batch.device.type != "cpu":
        batch.check_values()
    _check_pages(facts, batch)
    if told.sinks is not None:
        _same("sinks", f"{q_heads} logits, one a query head", told.sinks, told.sinks == q_heads)
        _same("sinks", f"them on {facts.device}", told.sinks_device,
              told.sinks_device == facts.device)  # fmt: skip
    _same(
        "mask",
        f"1 or {batch.num_requests} requests as the plan has",
        told.mask_batch,
        told.mask_batch in (1, batch.num_requests) or not batch.num_requests,
    )
    _same(
        "mask",
        f"1 or {facts.kv_heads} kv_heads as the layer has",
        told.mask_heads,
        told.mask_heads in (1, facts.kv_heads),
    )
    if batch.first_pages is not None and told.mask == "causal" and not batch.bounded:
        _check_given_back(batch, batch.first_pages, told.window)
    _check_needs(needs, facts, batch, q, told.mask)
    batch.passed.add(key)


def check_out(out: Tensor, q: Tensor, width: int) -> None:
    """ValueError where attention's output cannot go into ``out``."""
    wanted = (q.shape[0], q.shape[1], width)
    # One test first, sentences only where it fails: every layer of every step asks.
    if (
        out.shape == wanted
        and out.dtype == q.dtype
        and out.device == q.device
        and out.is_contiguous()
        and not out.is_neg()
        and not (out.requires_grad and torch.is_grad_enabled())
        and _apart(out, q)
    ):
        return
    _same("out", f"{wanted}, a row a query", tuple(out.shape), tuple(out.shape) == wanted)
    _same("out", f"{q.dtype} as the queries", out.dtype, out.dtype == q.dtype)
    _same("out", f"it on {q.device} as the queries", out.device, out.device == q.device)
    _same("out", "a contiguous last dimension", f"strides {out.stride()}",
          out.stride(-1) == 1 or out.shape[-1] == 1)  # fmt: skip
    _check_view("out", out)
    alone = all(stride for stride, size in zip(out.stride(), out.shape, strict=True) if size > 1)
    _same("out", "each number in its own place", f"strides {out.stride()}", alone)
    _same("out", "memory of its own", "that of the queries", _apart(out, q))


def _apart(out: Tensor, q: Tensor) -> bool:
    """Whether no number of one is in the other's memory; parts of one tensor that lie in turns
    (the columns of a fused projection) begin elsewhere."""
    a, b = out.data_ptr(), q.data_ptr()
    if a == b:
        return not q.numel()
    if not (out.is_contiguous() and q.is_contiguous()):
        return True
    return a + out.nbytes <= b or b + q.nbytes <= a


def check_write(
    rows: tuple[Tensor | None, Tensor, Tensor],
    layer: LayerKV,
    batch: BatchPlan,
    params: Any,
    needs: Needs,
) -> None:
    """ValueError where a write to ``layer`` cannot be right; see ops/rope_write for arguments."""
    batch.check_unchanged()
    q, k, v = rows
    _check_view("k", k)
    _check_view("v", v)
    if q is not None:
        _check_view("q", q)
    in_turn = layer.key_map is not None and layer.key_map.feedback is not None
    key = (
        needs, layer.facts, params.facts, k.shape, v.shape, k.dtype, v.dtype, k.device, v.device,
        None if q is None else (q.shape, q.dtype, q.device), in_turn,
    )  # fmt: skip
    if key in batch.passed:
        return
    facts, told = layer.facts, params.facts
    heads = facts.kv_heads
    _check_rows("k", k, batch, facts, heads, facts.head_dim)
    _check_rows("v", v, batch, facts, heads, facts.value_head_dim)
    q_heads = None if q is None else _check_rows("q", q, batch, facts, None, facts.query_dim)
    if told.checked and batch.device.type != "cpu":
        batch.check_values()
    _check_pages(facts, batch)
    if facts.latent:
        asked = [name for name in ("rope", "norm", "bias") if getattr(told, name) is not None]
        _same("params", "latent rows normed and turned by the model, no rope, norm or bias",
              " and ".join(asked), not asked)  # fmt: skip
    for device in told.devices:
        _same("params", f"tensors on {facts.device} as the pages", device, device == facts.device)
    if told.rope is not None:
        positions, channels = told.rope
        longest = max(
            (c for n, c in zip(batch.query_lens, batch.host_context_lens, strict=True) if n),
            default=0,
        )
        _same("rope", f"at least {longest} positions", positions, positions >= longest)
        _same("rope", f"at most {facts.head_dim} rotated channels, as a head has", channels,
              channels <= facts.head_dim)  # fmt: skip
    if told.norm is not None:
        _same("norm", f"{facts.head_dim} weights, a head's channels", told.norm,
              told.norm == facts.head_dim)  # fmt: skip
    if told.bias is not None:
        shapes = ((q_heads, facts.head_dim), (heads, facts.head_dim), (heads, facts.value_head_dim))
        for name, wanted, got in zip("qkv", shapes, told.bias, strict=True):
            # Without queries their bias is not read.
            fits = got == wanted or (name == "q" and q is None)
            _same(f"bias of {name}", f"{wanted}", got, fits)
    _check_needs(needs, facts, batch, k, "causal", in_turn)
    batch.passed.add(key)


def check_gather(
    pages: QuantizedPages,
    page_table: Tensor,
    context_len: int,
    dtype: torch.dtype,
    kind: str | None = None,
    read_back: bool = False,
) -> None:
    """ValueError where ``gather_request`` cannot be right.

    Page ids are checked on a CPU; on a GPU only with ``read_back``, which waits for the device.
    """
    if isinstance(context_len, bool) or not isinstance(context_len, int) or context_len < 0:
        raise ValueError(f"context_len: expected a number of tokens, got {context_len!r}")
    _same("dtype", "a floating dtype", dtype, dtype in FLOATS)
    _same("page_table", "a tensor", type(page_table).__name__, isinstance(page_table, Tensor))
    fits = page_table.ndim == 1 and page_table.dtype in (torch.int32, torch.int64)
    _same("page_table", "int32 or int64 [pages]", f"{page_table.dtype} {tuple(page_table.shape)}",
          fits)  # fmt: skip
    device = pages.codes.device
    _same("page_table", f"it on {device} as the pages", page_table.device,
          page_table.device == device)  # fmt: skip
    served = kind is None or device.type == kind or (kind == "cuda" and device.type == "cpu")
    _same("pages", f"memory of a {kind} device", device, served)
    used = -(-context_len // pages.page_size)
    _same("page_table", f"{used} pages for {context_len} tokens", page_table.shape[0],
          page_table.shape[0] >= used)  # fmt: skip
    if used and (device.type == "cpu" or read_back):
        low, high = (int(each) for each in page_table[:used].aminmax())
        _same("page_table", f"page ids from 0 to {pages.pages - 1}", low if low < 0 else high,
              low >= 0 and high < pages.pages)  # fmt: skip


def _check_view(name: str, x: Tensor) -> None:
    """What shapes and dtypes do not tell, asked at every call."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected no gradient to be asked for, as pages keep no graph; got a tensor "
            "that requires one (torch.no_grad() or detach() says that none is wanted)"
        )
    if x.is_neg():
        raise ValueError(
            f"{name}: expected numbers as they lie in memory, got a negated view (resolve_neg() "
            "writes it out)"
        )


def _check_rows(
    name: str, x: Tensor, batch: BatchPlan, facts: LayerFacts, heads: int | None, width: int
) -> int:
    """Rows of the step's tokens; the number of heads, a multiple of kv_heads where not given."""
    wanted = f"[{batch.num_tokens} tokens, {heads or 'q_heads'}, {width}]"
    fits = x.ndim == 3 and x.shape[0] == batch.num_tokens and x.shape[2] == width
    fits = fits and (heads is None or x.shape[1] == heads)
    _same(name, f"{wanted} for this plan and these pages", tuple(x.shape), fits)
    multiple = x.shape[1] > 0 and x.shape[1] % facts.kv_heads == 0
    _same(name, f"a multiple of {facts.kv_heads} kv_heads as its heads", x.shape[1], multiple)
    _same(name, "a floating dtype", x.dtype, x.dtype in FLOATS)
    _same(name, f"it on {facts.device} as the pages", x.device, x.device == facts.device)
    return x.shape[1]


def _check_pages(facts: LayerFacts, batch: BatchPlan) -> None:
    """The plan's pages are the layer's."""
    _same("batch", f"it on {facts.device} as the pages", batch.device,
          batch.device == facts.device)  # fmt: skip
    _same("batch.page_size", f"{facts.page_size} as the pages have", batch.page_size,
          batch.page_size == facts.page_size)  # fmt: skip
    if batch.largest_page is not None:
        _same("batch.page_table", f"page ids below {facts.pages}, the layer's pages",
              batch.largest_page, batch.largest_page < facts.pages)  # fmt: skip
    if facts.exact_pages is None:
        return
    _same("batch.exact", "a plan, as the layer keeps exact pages", None, batch.exact is not None)
    if batch.largest_exact_page is not None:
        _same("batch.exact.page_table", f"page ids below {facts.exact_pages}, its exact pages",
              batch.largest_exact_page, batch.largest_exact_page < facts.exact_pages)  # fmt: skip


def _check_given_back(batch: BatchPlan, first_pages: tuple[int, ...], window: int | None) -> None:
    """The window hides all pages that were given back."""
    rows = zip(batch.query_lens, batch.host_context_lens, first_pages, strict=True)
    for row, (new, context, first) in enumerate(rows):
        seen = 0 if window is None else max(0, context - new - window + 1)
        if new and seen // batch.page_size < first:
            raise ValueError(
                f"batch.first_pages[{row}]: expected at most {seen // batch.page_size}, as the "
                f"mask shows keys from {seen} on; got {first}"
            )


def _check_needs(
    needs: Needs, facts: LayerFacts, batch: BatchPlan, x: Tensor, mask: str, in_turn: bool = False
) -> None:
    """The implementation can serve it."""
    phase = needs.phase or phase_of(batch.max_query_len)
    refused = _refused(needs, facts, x.shape[1], x.dtype, phase, mask, in_turn)
    if refused:
        raise ValueError(f"this implementation cannot serve the call: {' '.join(refused)}")
    if needs.host_lengths:
        _same("batch.host_context_lens", "the context lengths, as this implementation reads them",
              "upper bounds", not batch.bounded)  # fmt: skip


@lru_cache(maxsize=1024)
def _refused(
    needs: Needs, facts: LayerFacts, heads: int, dtype: torch.dtype, phase: Phase, mask: str,
    in_turn: bool = False,
) -> list[str]:  # fmt: skip
    call = call_of(facts, heads, dtype, phase, mask, in_turn)
    if needs.kind == "cuda" and facts.device.type == "cpu":
        interpreter = DeviceInfo("cuda", "Triton's interpreter", None, 1)
        call = replace(call, device=interpreter)
    return needs.refusals(call)


def _same(name: str, expected: str, got: object, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")
