"""Decode on Hopper: the host side of its three kernels, and what the planner gives to Triton's.

The planner (decode/launch) knows where each is the faster one. Codes under few query rows go to
gluon_kernel and under more of them to gluon_drafts, exact pages under more to gluon_exact. Steps of
many short rows, pages without codes and what TMA cannot copy go to the Triton kernel.
"""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.cache.views import LayerKV
from quantpage.hardware import HOPPER, device_info
from quantpage.ops import refusals
from quantpage.ops.attend.decode import triton
from quantpage.ops.attend.decode.gluon_drafts import drafts_kernel
from quantpage.ops.attend.decode.gluon_exact import exact_kernel
from quantpage.ops.attend.decode.gluon_join import join_kernel
from quantpage.ops.attend.decode.gluon_kernel import decode_kernel
from quantpage.ops.attend.decode.launch import JOINED_PIECES, joined_together, most_pieces
from quantpage.ops.attend.results import Results
from quantpage.ops.checks import Needs
from quantpage.ops.operand import A_TOKEN, Operand
from quantpage.ops.triton.gluon_compat import TensorDescriptor

_ELEMENTS = {
    torch.int8: gl.int8, torch.uint8: gl.uint8, torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
}  # fmt: skip


def decode_into(
    results: Results, q, layer, batch, params, options: triton.Options = triton.WHOLE
) -> triton.Arranged | None:
    """As ``triton.decode_into`` says."""
    if layer.exact_key is not None:
        hopper = serves(q, layer)
        triton.with_exact(decode_into, results, q, layer, batch, params, options, hopper)
        return None
    tiles = options.tiles
    if tiles is None:
        tiles = triton.planned(q, layer, batch, params, options.segment, hopper=serves(q, layer))
    options = options._replace(tiles=tiles, join=join)
    if not tiles.wgmma:
        return triton.decode_into(results, q, layer, batch, params, options)
    made = triton.arrange(results, q, layer, batch, params, options)
    if not made.programs:
        return made
    if tiles.drafts:
        (k, v), (queries, _, _, _, _, _, _, *others) = made.halves, made.given
        codes = copied(k.codes, tiles.tile), copied(v.codes, tiles.tile)
        scales = [_plane(half.scale, half, tiles.tile) for half in (k, v)]
        zeros = [_plane(half.zero, half, tiles.tile) for half in (k, v)]
        given = queries, *codes, *scales, *zeros, *others, *made.places
        if tiles.whole:
            exact_kernel[(made.programs,)](*given, **made.fixed, BESIDE=made.beside)
            return made
        drafts_kernel[(made.programs,)](*given, **made.fixed)
    else:
        decode_kernel[(made.programs,)](*made.given, *made.places, **made.fixed)
    if options.earlier is None:
        join(made)
    return made


def join(made: triton.Arranged) -> None:
    """Rows that were cut, joined by gluon_join where that is the faster one."""
    (all_rows, queries), given, fixed = made.merge
    pieces = most_pieces(made.programs, all_rows, made.seen_lengths())
    together = joined_together(pieces, all_rows, queries, fixed["VALUE_DIM"])
    # Of a step of one request triton_cuts knows where pieces are.
    if not together or fixed["ONE"]:
        triton.join_cuts(made)
        return
    own = {n: each for n, each in fixed.items() if n not in ("programs", "min_tiles", "ONE")}
    own |= {"PARTS": JOINED_PIECES, "num_warps": together}
    join_kernel[(all_rows, -(-queries // together))](*given, **own)


def copied(pages: Tensor, tile: int) -> TensorDescriptor:
    """[pages, kv_heads, page], or with rows, as TMA copies it: ``tile`` keys of one page."""
    block = [1, 1, tile, *pages.shape[3:]]
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[pages.dtype])
    return TensorDescriptor.from_tensor(pages, block, layout)


def _plane(plane: Tensor, half: Operand, tile: int) -> TensorDescriptor | Tensor:
    """Scales or zeros of tokens; those of channels as they lie, as what stands in for none."""
    own = half.scales == A_TOKEN and plane is not half.codes
    return copied(plane.squeeze(-1), tile) if own else plane


def serves(q: Tensor, layer: LayerKV) -> bool:
    """Whether the Hopper kernel takes these widths on this device."""
    if device_info(q.device).capability != HOPPER:
        return False
    return q.shape[-1] == layer.value.head_dim and layer.value.head_dim in refusals.HOPPER_WIDTHS


attend = triton.decoder(Needs(refusals.DECODE_GLUON, kind="cuda"), decode_into)
