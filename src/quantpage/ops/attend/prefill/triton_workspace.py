"""Pages to a 16-bit workspace, and parts of a row's keys to one result: what both kernels do around
their launches."""

import numpy as np
import torch
from torch import Tensor

from quantpage.cache.views import LayerKV
from quantpage.ops.attend.flash.triton_merge import merge_partials
from quantpage.ops.attend.prefill.plan import DensePass
from quantpage.ops.attend.results import Results
from quantpage.ops.gather.triton import gather_layer


def fill_workspace(
    each: DensePass, spans: Tensor, layer: LayerKV, page_table: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[heads, rows, head_dim] of K and of V; torch's allocator keeps the memory between layers."""
    heads, rows, device = each.heads, each.rows, page_table.device
    k = torch.empty(heads, rows, layer.key.head_dim, dtype=dtype, device=device)
    v = torch.empty(heads, rows, layer.value.head_dim, dtype=dtype, device=device)
    gather_layer(layer, page_table, spans, each.max_span, (k, v), each.head0)
    return k, v


def merge_parts(parts: Results, sinks: Tensor | None, results: Results) -> None:
    """Parts into ``results``; the parts are used up."""
    assert parts.lse is not None
    outs, lses = list(parts.out.unbind()), list(parts.lse.unbind())
    if len(outs) > 2:
        # All but the last into the first, so that nothing between is rounded to 16 bits.
        merge_partials(outs[:-1], lses[:-1], out=outs[0], lse=lses[0])
    ends = [outs[0], outs[-1]], [lses[0], lses[-1]]
    merge_partials(*ends, sinks, out=results.out, lse=results.lse)


def on_device(table: np.ndarray, device: str) -> Tensor:
    """A plan's table where kernels read it."""
    return torch.from_numpy(table).to(device)
