"""Decode over latent rows on Hopper: the host side of gluon_kernel, which hands on what the planner
gives to Triton.
"""

from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops import refusals
from quantpage.ops.attend.decode.launch import chunk_of
from quantpage.ops.attend.latent import triton
from quantpage.ops.attend.latent.gluon_kernel import decode_kernel
from quantpage.ops.attend.latent.launch import LatentTiles
from quantpage.ops.attend.params import AttendParams
from quantpage.ops.attend.results import Asked, Results, kernel, results_for
from quantpage.ops.checks import Needs


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
        return results
    made = triton.arrange(results, q, layer, batch, params, tiles)
    decode_kernel[(made.programs,)](
        *made.given,
        **made.both,
        CODE=made.row.code,
        ROW_DIM=made.row.head_dim,
        ROTARY_DIM=made.rotary.head_dim,
        HEADS=q.shape[1],
        SOFTCAP=params.softcap is not None,
        CHUNK=chunk_of(batch.num_requests),
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    triton.join(made)
    return results
