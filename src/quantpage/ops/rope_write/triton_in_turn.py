"""Keys that are rounded in turn (formats/feedback) on a GPU: the launch of their kernel."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats.feedback import range_factors
from quantpage.hardware import device_info
from quantpage.kept import KeptWith
from quantpage.ops.rope_write.triton_in_turn_kernel import BLOCK, in_turn_kernel

FEW_TOKENS = 256
"""Up to so many every range of a row has a thread of its own: a row's channels take their time one
after the other, whatever else the device could do."""


class Coupling(NamedTuple):
    """``KeyMap.feedback`` in steps of the codes, [kv_heads, head_dim, head_dim] each."""

    lower: Tensor
    """float32: U below the diagonal, times the steps' ratio; on it what a step of error costs."""
    high: Tensor
    """float16: U between blocks of channels, 0 within them."""
    low: Tensor
    """What ``high`` rounded off."""


def _coupling(feedback: Tensor, pages: QuantizedPages) -> Coupling:
    lower = feedback
    heads, width = feedback.shape[:2]
    if pages.scale is not None and not pages.spec.dynamic:
        step = pages.scale.float().repeat_interleave(width // pages.scale.shape[1], 1)
        step = step.expand(heads, width)
        loss = feedback.diagonal(dim1=1, dim2=2) * step.square()
        lower = feedback.tril(-1) * step[:, :, None] / step[:, None, :] + torch.diag_embed(loss)
    block = torch.arange(width, device=feedback.device) // BLOCK.value
    between = torch.where(block[:, None] > block, lower, 0.0)
    high = between.half()
    return Coupling(lower.contiguous(), high, (between - high.float()).half())


def _couplings_of(layer: LayerKV) -> tuple[Coupling, Coupling | None]:
    """Of the body's codes, and of near pages of whole numbers."""
    assert layer.key_map is not None and layer.key_map.feedback is not None
    near = layer.exact_key
    made = _coupling(layer.key_map.feedback, layer.key)
    if not (isinstance(near, QuantizedPages) and near.spec.code.integer):
        return made, None
    return made, made if layer.key.spec.dynamic else _coupling(layer.key_map.feedback, near)


_couplings = KeptWith(_couplings_of)


def launch(layer: LayerKV, tokens: int, given: dict[str, object], fixed: dict[str, object]) -> None:
    """Write the keys of a step. given, fixed: arguments that the write's kernel has as well."""
    coupling, near_coupling = _couplings(layer)
    few = tokens <= FEW_TOKENS
    rows = 16 if few else 32
    factors = len(range_factors(layer.key.spec))
    tried = triton.next_power_of_2(factors + 1) if few else 1
    near = layer.exact_key.spec if isinstance(layer.exact_key, QuantizedPages) else None
    near_factors = 1 if near is None else len(range_factors(near))
    near_tried = triton.next_power_of_2(near_factors + 1) if few else 1
    width, items = layer.key.head_dim, triton.cdiv(tokens, rows) * layer.kv_heads
    device = layer.device
    # A few where kernels are interpreted.
    processors = device_info(device).processors if device.type == "cuda" else 1
    programs = min(items, processors * 8)
    own = 2 * width * rows + 2 * rows + width
    own_codes = rows * max(tried, near_tried) * width
    in_turn_kernel[(programs,)](
        **given,
        coupling=coupling,
        near_coupling=near_coupling,
        own=torch.empty(programs * own, dtype=torch.float32, device=device),
        own_codes=torch.empty(programs * own_codes, dtype=torch.float16, device=device),
        **fixed,
        FACTORS=factors,
        TRIED=tried,
        NEAR_FACTORS=near_factors,
        NEAR_TRIED=near_tried,
        ROWS=rows,
        CHUNK=min(64, triton.next_power_of_2(width)),
        OWN=own,
        OWN_CODES=own_codes,
        num_warps=max(1, rows * tried // 32),
        # What a program reads it may have written just before.
        num_stages=1,
    )
