"""Keys that are rounded in turn (formats/feedback) on a GPU: the launch of one of two kernels.

Rows of 16 bits that products turn stay in registers of four lanes (triton_in_turn_lanes_kernel),
channels of others go through memory in blocks (triton_in_turn_kernel).
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats.feedback import range_factors
from quantpage.hardware import device_info
from quantpage.kept import KeptWith
from quantpage.ops.rope_write.triton_in_turn_block import BLOCK
from quantpage.ops.rope_write.triton_in_turn_kernel import in_turn_kernel
from quantpage.ops.rope_write.triton_in_turn_lanes import Lanes, lanes_of
from quantpage.ops.rope_write.triton_in_turn_lanes_kernel import in_lanes_kernel
from quantpage.ops.rope_write.triton_products import as_written

FEW_TOKENS = 256
"""Up to so many a tile in blocks is sixteen of them: a row's channels take their time one after the
other, whatever else the device could do, and half of a tile is turned in half of the time."""
PROGRAMS = 8
"""Of a multiprocessor, at most: as many as its registers hold."""


class Coupling(NamedTuple):
    """``KeyMap.feedback`` in steps of the codes, cut into blocks of BLOCK channels."""

    within: Tensor
    """float32 [kv_heads, blocks, BLOCK, BLOCK]: U within a block below the diagonal, times the
    steps' ratio, negative; on it what a step of error costs."""
    between: Tensor
    """float16 [kv_heads, blocks, BLOCK, blocks or more x BLOCK]: U from a block to the one before
    it, to the one before that, .., then 0."""
    rest: Tensor
    """What ``between`` rounded off, where steps differ; U itself is exact in float16."""


def _coupling(feedback: Tensor, pages: QuantizedPages) -> Coupling:
    lower = feedback
    heads, width = feedback.shape[:2]
    static = pages.scale is not None and not pages.spec.dynamic
    if static:
        assert pages.scale is not None
        step = pages.scale.float().repeat_interleave(width // pages.scale.shape[1], 1)
        step = step.expand(heads, width)
        loss = feedback.diagonal(dim1=1, dim2=2) * step.square()
        lower = feedback.tril(-1) * step[:, :, None] / step[:, None, :] + torch.diag_embed(loss)
    size = BLOCK.value
    blocks = width // size
    tiles = lower.unflatten(2, (blocks, size)).unflatten(1, (blocks, size)).transpose(2, 3)
    own = tiles.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)
    within = (2 * torch.diag_embed(own.diagonal(dim1=2, dim2=3)) - own).contiguous()
    # Of a block's rows first what the block before it hears, then the one before that.
    wide = triton.next_power_of_2(blocks)
    between = torch.zeros(heads, blocks, size, wide, size, device=feedback.device)
    for block in range(blocks):
        for back in range(block):
            between[:, block, :, back] = tiles[:, block, block - 1 - back]
    between = -between
    rest = between - between.half().float()
    between, rest = (each.flatten(3).half().contiguous() for each in (between, rest))
    return Coupling(within, between, rest if static else between)


def _near_of(layer: LayerKV) -> QuantizedPages | None:
    """Near pages whose codes are whole numbers, as those alone are rounded in turn."""
    near = layer.exact_key
    return near if isinstance(near, QuantizedPages) and near.spec.code.integer else None


def _couplings_of(layer: LayerKV) -> tuple[Coupling, Coupling | None]:
    """Of the body's codes, and of near pages'."""
    assert layer.key_map is not None and layer.key_map.feedback is not None
    feedback, near = layer.key_map.feedback, _near_of(layer)
    made = _coupling(feedback, layer.key)
    if near is None:
        return made, None
    return made, made if layer.key.spec.dynamic else _coupling(feedback, near)


def _lanes_of(layer: LayerKV) -> tuple[Lanes, Lanes | None]:
    """The same for rows that stay in the registers of four lanes."""
    assert layer.key_map is not None and layer.key_map.feedback is not None
    feedback, near = layer.key_map.feedback, _near_of(layer)
    other = None if near is None else lanes_of(feedback, near.spec)
    return lanes_of(feedback, layer.key.spec), other


_couplings = KeptWith(_couplings_of)
_lanes = KeptWith(_lanes_of)


def launch(
    layer: LayerKV,
    tokens: int,
    given: dict[str, object],
    fixed: dict[str, object],
    can_multiply: bool,
) -> None:
    """Write the keys of a step. given, fixed: arguments that the write's kernel has as well.
    can_multiply: rows may be rotated by products, eight of them a warp.
    """
    factors = range_factors(layer.key.spec)
    near = layer.exact_key.spec if isinstance(layer.exact_key, QuantizedPages) else None
    near_factors = (1.0,) if near is None else range_factors(near)
    tried, near_tried = (triton.next_power_of_2(len(each)) for each in (factors, near_factors))
    fixed = {**fixed, "FACTORS": factors, "NEAR_FACTORS": near_factors}
    lanes = can_multiply and layer.key.spec.dynamic
    if lanes:
        if _written_in_lanes(layer, tokens, given, fixed, max(tried, near_tried)):
            return
        # What that launch writes is wrong, and in the same pages: this one begins behind its end.
        fixed |= {"OVERLAP": False, "launch_pdl": False}
    coupling, near_coupling = _couplings(layer)
    width, device = layer.key.head_dim, layer.device
    # A warp has a thread for every range of a row.
    rows = 16 if tokens <= FEW_TOKENS or tried > 1 else 32
    items = triton.cdiv(tokens, rows) * layer.kv_heads
    # A few where kernels are interpreted.
    processors = device_info(device).processors if device.type == "cuda" else 1
    programs = min(items, processors * PROGRAMS)
    own = width * rows + 2 * rows
    own_codes = rows * max(tried, near_tried) * width
    in_turn_kernel[(programs,)](
        **given,
        coupling=coupling,
        near_coupling=near_coupling,
        own=torch.empty(programs * own, dtype=torch.float32, device=device),
        own_codes=torch.empty(programs * own_codes, dtype=torch.int8, device=device),
        **fixed,
        TRIED=tried,
        NEAR_TRIED=near_tried,
        ROWS=rows,
        OWN=own,
        OWN_CODES=own_codes,
        # What is said to blocks is kept by all threads together.
        num_warps=max(1, rows * tried // 32, triton.next_power_of_2(width) // 128),
        # What a program reads it may have written just before.
        num_stages=1,
    )


WARPS = 4
"""Of a program that keeps rows in lanes: they share a kv_head and what its channels say. One and
two were no faster (benchmarks/results/h100-write-in-turn.csv)."""


def _written_in_lanes(
    layer: LayerKV,
    tokens: int,
    given: dict[str, object],
    fixed: dict[str, object],
    tried: int,
) -> bool:
    """Whether the compiler put rows where that kernel wants them. tried: rows of a token."""
    lanes, near_lanes = _lanes(layer)
    each = 8 * WARPS // tried
    compiled = in_lanes_kernel[(triton.cdiv(tokens, each) * layer.kv_heads,)](
        **given,
        lanes=lanes,
        near_lanes=near_lanes,
        **{name: value for name, value in fixed.items() if name != "SCALES"},
        TRIED=tried,
        ROWS=8 * WARPS,
        num_warps=WARPS,
    )
    return as_written(compiled)
