"""Steps with exact pages for kernel tests: poison in whatever no query reads, and their oracle."""

from dataclasses import replace

import torch

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import KVFormat
from quantpage.masks import Mask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.gather.reference import gather_request
from tests.ops.triton_cases import Step, make_step

POISON = (torch.nan, torch.inf, -torch.inf)


def make_segments(
    form: KVFormat, step: Step, mask: Mask, dtype=torch.float16, seed: int = 0
) -> tuple[torch.Tensor, LayerKV, BatchPlan]:
    """``make_step`` with exact pages whose numbers differ from the codes', in tables of their own.

    What no query reads through its codes has NaN scales; what none reads exactly is not finite.
    """
    q, layer, batch = make_step(
        form.key, form.value, step, mask, dtype, seed, exact=True, near=form.near
    )
    assert batch.exact is not None
    size, first = batch.page_size, 0
    coded = torch.zeros(layer.key.pages * size, dtype=torch.bool)
    near = torch.zeros(layer.exact().key.pages * size, dtype=torch.bool)
    for request, (new, context) in enumerate(zip(step.queries, step.contexts, strict=True)):
        if not new:
            continue
        positions, keys = torch.arange(context - new, context), torch.arange(context)
        seen = mask.materialize(positions, context, request)
        exact = exact_pairs(positions, keys, size)
        for table, kept, pairs in (
            (batch.page_table, coded, seen & ~exact),
            (batch.exact.page_table, near, seen & exact),
        ):
            slots = table[request].cpu().long()[keys // size] * size + keys % size
            kept[slots[pairs.any(0)]] = True
        first += new
    for part, kept in ((layer, coded), (layer.exact(), near)):
        for half in (part.key, part.value):
            for plane in (half.scale, half.zero):
                if plane is not None and half.spec.dynamic:
                    hide(plane, kept, (torch.nan,))
            if part is not layer and not half.spec.quantized:
                hide(half.codes, kept, POISON)
    return q, layer, batch


def hide(plane: torch.Tensor, kept: torch.Tensor, poison: tuple[float, ...]) -> None:
    """Numbers of slots that are not kept become ``poison``, in turns."""
    pages, _, size, width = plane.shape
    turns = torch.arange(pages * size * width).view(pages, 1, size, width) % len(poison)
    fill = torch.tensor(poison, dtype=plane.dtype)[turns].to(plane.device)
    plane.copy_(torch.where(kept.view(pages, 1, size, 1).to(plane.device), plane, fill))


def oracle(q, layer: LayerKV, batch: BatchPlan, params: AttendParams):
    """Output and natural log-sum-exp in float64: every pair by itself, hidden ones never read."""
    group, row, outs, lses = q.shape[1] // layer.kv_heads, 0, [], []
    for request, (new, context) in enumerate(
        zip(batch.query_lens, batch.host_context_lens, strict=True)
    ):
        rows = q[row : row + new].cpu().double().unflatten(1, (-1, group))
        row += new
        positions = torch.arange(context - new, context)
        tables = [(layer.key, layer.value, batch.page_table[request])]
        if layer.exact_key is not None:
            assert batch.exact is not None
            exact = layer.exact()
            tables.append((exact.key, exact.value, batch.exact.page_table[request].clamp_min(0)))
        near = exact_pairs(positions, torch.arange(context), batch.page_size)
        near = near[:, None, None] & (len(tables) > 1)
        seen = torch.stack(
            [params.mask.materialize(positions, context, request, h) for h in range(rows.shape[1])],
            1,
        )[:, :, None]
        scores, values = [], []
        for key, value, table in tables:
            k, v = (
                gather_request(half, table, context, torch.float64).cpu() for half in (key, value)
            )
            scores.append(torch.einsum("thgd,khd->thgk", rows, k))
            values.append(v.transpose(0, 1)[None, :, None])
        s = torch.where(near, scores[-1], scores[0]) * params.softmax_scale
        if params.softcap is not None:
            s = params.softcap * torch.tanh(s / params.softcap)
        s = s.masked_fill(~seen, -torch.inf)
        if params.sinks is not None:
            sink = params.sinks.cpu().double().view(1, -1, group, 1).expand(new, -1, -1, 1)
            lse = torch.cat([s, sink], -1).logsumexp(-1)
        else:
            lse = s.logsumexp(-1)
        weights = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])[..., None]
        v = torch.where(near[..., None], values[-1], values[0])
        outs.append(torch.where(seen[..., None], weights * v, 0.0).sum(3).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def spoil(layer: LayerKV, batch: BatchPlan, at: int, what: float, half: str) -> LayerKV:
    """``layer`` with the number ``what`` in a channel of position ``at`` of every request, wherever
    it is kept as it came: unquantized pages, exact pages.
    """
    size = batch.page_size

    def spoiled(pages, table):
        pages = pages.clone()
        pages[table[:, at // size].long(), :, at % size, 3] = what
        return pages

    own = getattr(layer, half)
    if not own.spec.quantized:
        codes = spoiled(own.codes, batch.page_table)
        layer = replace(layer, **{half: replace(own, codes=codes)})
    if isinstance(layer.exact_key, torch.Tensor):
        assert batch.exact is not None
        exact = spoiled(getattr(layer, f"exact_{half}"), batch.exact.page_table)
        layer = replace(layer, **{f"exact_{half}": exact})
    return layer
