"""Decode over latent rows (MLA) in DeepSeek-V3's shapes, beside copying and multiplying alone."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.bench.cases import (
    Case,
    cache_bytes,
    make_batch,
    random_pages,
    relative_error,
)
from quantpage.bench.rows import Row, row_of
from quantpage.bench.timing import COLD_BYTES, graph_microseconds
from quantpage.cache.views import LayerKV
from quantpage.formats import FORMATS
from quantpage.ops import attend as attend_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import call_of, choose
from quantpage.ops.gather.reference import gather_request

RANK, ROTARY = 512, 64
GATE = 1e-2
"""No speed is reported above this error, as of decode."""
FORMATS_TIMED = ("none", "int8", "fp8")


def _case(requests: int, context: int, new: int, heads: int) -> Case:
    tokens = f", {new} tokens" if new > 1 else ""
    return Case(
        requests, context, FORMATS_TIMED, new=new, q_heads=heads, kv_heads=1, head_dim=RANK,
        title=f"{requests} x {context // 1024}k, {heads} heads{tokens}",
    )  # fmt: skip


_STEPS = ((64, 4096, 1), (16, 32768, 1), (1, 32768, 1), (8, 8192, 1), (64, 4096, 4))
CASES = tuple(_case(*step, heads) for heads in (128, 16) for step in _STEPS)


def measure(case: Case, name: str, copy: float, timed: bool) -> Iterator[Row]:
    """Ours for one format: a row, or nothing where only checked."""
    layers = [latent_layer(case, name)]
    size = cache_bytes(layers[0])
    count = max(2, min(32, -(-COLD_BYTES // size))) if timed else 1
    layers += [latent_layer(case, name) for _ in range(count - 1)]
    batch = make_batch(case, False)
    q = torch.randn(
        case.requests * case.new, case.q_heads, RANK + ROTARY, device="cuda", dtype=torch.bfloat16
    )
    params = AttendParams((RANK + ROTARY) ** -0.5)
    call = call_of(layers[0].facts, case.q_heads, q.dtype, "decode")
    chosen = choose(attend_op.CANDIDATES, call)
    out, _ = attend_op.attend(q, layers[0], batch, params, chosen)
    error = relative_error(out[-case.new :], exact_rows(q, layers[0], batch, params.softmax_scale))
    if not error < GATE:
        raise ValueError(f"{case.name} {name}: expected an error below {GATE}, got {error:.1e}")
    if not timed:
        return

    def run() -> None:
        for layer in layers:
            attend_op.attend(q, layer, batch, params, chosen)

    time = graph_microseconds(run, len(layers))
    ours = (case.name, f"quantpage {chosen.name}")
    print(f"{case.name} {name}: {operations(case) / time / 1e6:.0f} TFLOP/s", flush=True)
    yield row_of("latent", case, name, ours, (time, size, copy, error))


def operations(case: Case) -> float:
    """Of the products of a step: every head with every row twice, and its rotary channels."""
    return 2 * case.q_heads * (2 * RANK + ROTARY) * case.requests * case.new * case.context


def latent_layer(case: Case, name: str, device: str = "cuda") -> LayerKV:
    """One layer's random rows and rotary channels."""
    given, pages = FORMATS[name], case.requests * -(-case.context // case.page_size)
    rows, rotary = (
        random_pages(spec, pages, replace(case, head_dim=width), device)
        for spec, width in ((given.key, RANK), (given.value, ROTARY))
    )
    return LayerKV(rows, rotary, latent=True)


def exact_rows(q: Tensor, layer: LayerKV, batch: BatchPlan, scale: float) -> Tensor:
    """The last request's output in float64 over the same rows, [new, q_heads, RANK]."""
    new, context = batch.query_lens[-1], batch.host_context_lens[-1]
    rows, rotary = (
        gather_request(half, batch.page_table[-1], context, torch.float64)[:, 0]
        for half in (layer.key, layer.value)
    )
    asked = q[-new:].double()
    scores = torch.einsum("thd,kd->thk", asked, torch.cat([rows, rotary], -1)) * scale
    key = torch.arange(context, device=q.device)
    hidden = key[None] > (context - new + torch.arange(new, device=q.device))[:, None]
    return scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1) @ rows
