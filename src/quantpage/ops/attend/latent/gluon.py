"""Attention over latent rows on Hopper: the host side of gluon_kernel, which hands on what the
planner gives to Triton.
"""

from functools import lru_cache

from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.masks import FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.decode.launch import chunk_of
from quantpage.ops.attend.flash.tiles import processors_of
from quantpage.ops.attend.latent import triton
from quantpage.ops.attend.latent.gluon_kernel import attend_kernel
from quantpage.ops.attend.latent.launch import LatentTiles
from quantpage.ops.attend.latent.prompts import PromptPlan, PromptShape, plan_prompts
from quantpage.ops.attend.latent.triton_cuts import join_rows_kernel
from quantpage.ops.attend.params import AttendParams, reach_of
from quantpage.ops.attend.prefill.triton_workspace import on_device
from quantpage.ops.attend.results import Asked, Results, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.dispatch import DECODE_TOKENS


@kernel(Needs(refusals.LATENT_GLUON, kind="cuda"))
def attend(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    asked: Asked,
    tiles: LatentTiles | None = None,
) -> Results:
    """tiles: the launch's shape; None: the planner's choice."""
    results = results_for(q, layer.key.head_dim, True, asked.out, asked.lse)
    if not q.shape[0]:
        return results
    tiles = tiles or triton.planned(q, layer, batch, hopper=True)
    if not tiles.wgmma:
        triton.decode_into(results, q, layer, batch, params, tiles)
    elif batch.max_query_len > DECODE_TOKENS:
        _prompts(results, q, layer, batch, params, tiles)
    else:
        made = triton.arrange(results, q, layer, batch, params, tiles)
        _launch(made, q, params, tiles, chunk_of(batch.num_requests), (None, None))
        if made.counters is None:
            triton.join(made)
    return results


def _launch(
    made: triton.Arranged,
    q: Tensor,
    params: AttendParams,
    tiles: LatentTiles,
    chunk: int,
    planned: tuple[Tensor, Tensor] | tuple[None, None],
) -> None:
    """planned: a prompt's pieces and where each program's start."""
    attend_kernel[(made.programs,)](
        *made.given,
        made.hints,
        made.row.codes.shape[0],
        made.counters,
        *planned,
        **made.both,
        CODE=made.row.code,
        ROW_DIM=made.row.head_dim,
        ROTARY_DIM=made.rotary.head_dim,
        HEADS=q.shape[1],
        SOFTCAP=params.softcap is not None,
        CHUNK=chunk,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )


@lru_cache(maxsize=32)
def _tables(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], shape: PromptShape, device: str
) -> tuple[PromptPlan, Tensor, Tensor, Tensor]:
    """A step's plan and its tables on the device: every layer of a step shares them."""
    plan = plan_prompts(query_lens, context_lens, shape)
    pieces, starts = on_device(plan.pieces, device), on_device(plan.starts, device)
    return plan, pieces, starts, on_device(plan.cuts, device)


def _prompts(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    tiles: LatentTiles,
) -> None:
    """A step by its plan: pieces that end where their tokens' keys do."""
    window, sink_tokens = reach_of(params.mask)
    programs = processors_of(q.device) * tiles.programs_per_processor
    causal = not isinstance(params.mask, FullMask)
    shape = PromptShape(q.shape[1], tiles.rows, tiles.tile, programs, causal, window, sink_tokens)

    plan, pieces, starts, cuts = _tables(
        batch.query_lens, batch.host_context_lens, shape, str(q.device)
    )
    made = triton.arrange(results, q, layer, batch, params, tiles, plan.slots)
    _launch(made, q, params, tiles, 1, (pieces, starts))
    if not plan.slots:
        return
    (out, lse), (part_out, part_lse) = results, made.given[11:13]
    join_rows_kernel[(len(plan.cuts), tiles.rows)](
        cuts,
        part_out,
        part_lse,
        batch.query_starts,
        params.sinks,
        out,
        lse,
        out.stride(0),
        out.stride(1),
        HEADS=q.shape[1],
        ROWS=tiles.rows,
        ROW_DIM=made.row.head_dim,
        SINKS=params.sinks is not None,
        PARTS=8,
        OVERLAP=made.both["OVERLAP"],
        launch_pdl=made.both["OVERLAP"],
        num_warps=4,
    )
