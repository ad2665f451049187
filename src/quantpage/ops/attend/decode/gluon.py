"""Decode on Hopper: the host side of gluon_kernel, which hands on what the planner gives to Triton.

The planner (decode/launch) knows where each kernel is the faster one: steps of many short rows, of
long contexts in few rows and unquantized pages go to the Triton kernel, exact pages always.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops import refusals
from quantpage.ops.attend.decode import triton
from quantpage.ops.attend.decode.gluon_kernel import decode_kernel
from quantpage.ops.attend.decode.launch import DecodeTiles
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.attend.results import Results, results_for
from quantpage.ops.checks import Needs, attends


@attends(Needs(refusals.DECODE_GLUON, kind="cuda"))
def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
    tiles: DecodeTiles | None = None,
    earlier: tuple[Tensor, Tensor] | None = None,
    out: Float[Tensor, "tokens q_heads value_dim"] | None = None,
    lse_wanted: bool = True,
) -> Results:
    """As decode/triton.attend."""
    final = segment == "all" or earlier is not None
    results = results_for(q, layer.value.head_dim, final, out, lse_wanted)
    decode_into(results, q, layer, batch, params, segment, tiles, earlier)
    return results


def decode_into(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
    tiles: DecodeTiles | None = None,
    earlier: tuple[Tensor, Tensor] | None = None,
) -> None:
    """As decode/triton.decode_into."""
    if tiles is None:
        tiles = triton.planned(q, layer, batch, segment, hopper=serves(q, layer))
    if not tiles.wgmma:
        triton.decode_into(results, q, layer, batch, params, segment, tiles, earlier)
        return
    made = triton.arrange(results, q, layer, batch, params, segment, tiles)
    if made.programs:
        decode_kernel[(made.programs,)](*made.given, *made.places, **made.fixed)
        triton.join(made)


def serves(q: Tensor, layer: LayerKV) -> bool:
    """Whether the Hopper kernel takes these widths on this device."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    return q.shape[-1] == layer.value.head_dim and layer.value.head_dim in refusals.HOPPER_WIDTHS
