"""Decode on Hopper: the host side of gluon_kernel, which hands on what the planner gives to Triton.

The planner (decode/launch) knows where each kernel is the faster one: steps of many short rows, of
long contexts in few rows and unquantized pages go to the Triton kernel, exact pages always.
"""

from torch import Tensor

from quantpage.cache.views import LayerKV
from quantpage.hardware import HOPPER, device_info
from quantpage.ops import refusals
from quantpage.ops.attend.decode import triton
from quantpage.ops.attend.decode.gluon_kernel import decode_kernel
from quantpage.ops.attend.results import Results
from quantpage.ops.checks import Needs


def decode_into(
    results: Results, q, layer, batch, params, options: triton.Options = triton.WHOLE
) -> None:
    """As ``triton.decoder`` says."""
    if layer.exact_key is not None:
        triton.with_exact(decode_into, results, q, layer, batch, params, serves(q, layer))
        return
    tiles = options.tiles
    if tiles is None:
        tiles = triton.planned(q, layer, batch, options.segment, hopper=serves(q, layer))
    options = options._replace(tiles=tiles)
    if not tiles.wgmma:
        triton.decode_into(results, q, layer, batch, params, options)
        return
    made = triton.arrange(results, q, layer, batch, params, options)
    if made.programs:
        decode_kernel[(made.programs,)](*made.given, *made.places, **made.fixed)
        triton.join(made)


def serves(q: Tensor, layer: LayerKV) -> bool:
    """Whether the Hopper kernel takes these widths on this device."""
    if device_info(q.device).capability != HOPPER:
        return False
    return q.shape[-1] == layer.value.head_dim and layer.value.head_dim in refusals.HOPPER_WIDTHS


attend = triton.decoder(Needs(refusals.DECODE_GLUON, kind="cuda"), decode_into)
