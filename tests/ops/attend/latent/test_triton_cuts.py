"""The launch that joins a prompt's rows over latent rows, in the interpreter or on a GPU."""

import numpy as np
import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import DEVICE, TIER

# isort: split
from quantpage.ops.attend.latent.triton_cuts import join_rows_kernel

pytestmark = TIER


@pytest.mark.parametrize("sinks", [False, True])
def test_cut_rows_are_joined(sinks):
    heads, rows, width = 6, 16, 64
    torch.manual_seed(0)
    query_starts = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    # Rows 16 .. 30 of the second request in three pieces, the first of the first in two.
    cuts = torch.tensor([[1, 3, 1, 16], [4, 2, 0, 0]], dtype=torch.int32, device=DEVICE)
    part_out = torch.full((12, rows, width), torch.nan, device=DEVICE)
    part_lse = torch.full((12, rows), torch.nan, device=DEVICE)
    part_out[2::2], part_lse[2::2] = torch.randn(5, rows, width), torch.randn(5, rows) * 3
    part_lse[4, 5] = -torch.inf
    sink = torch.randn(heads, device=DEVICE) if sinks else None
    out = torch.full((8, heads, width), 7.0, device=DEVICE)
    lse = torch.full((8, heads), 7.0, device=DEVICE)
    join_rows_kernel[(2, 4)](
        cuts, part_out, part_lse, query_starts, sink, out, lse, out.stride(0), out.stride(1),
        HEADS=heads, ROWS=rows, ROW_DIM=width, SINKS=sinks, PARTS=2, OVERLAP=False,
    )  # fmt: skip
    wanted, wanted_lse = torch.full_like(out, 7.0).flatten(0, 1), torch.full((48,), 7.0)
    for slot, pieces, first, count in ((1, 3, 3 * heads + 16, 14), (4, 2, 0, 16)):
        logs = part_lse[2 * slot : 2 * (slot + pieces) : 2, :count].double().cpu() * np.log(2)
        values = part_out[2 * slot : 2 * (slot + pieces) : 2, :count].double().cpu()
        if sinks:
            head = (torch.arange(count) + (16 if slot == 1 else 0)) % heads
            logs = torch.cat([logs, sink.double().cpu()[head][None]])
            values = torch.cat([values, torch.zeros_like(values[:1])])
        weights = logs.softmax(0)
        wanted[first : first + count] = (weights[..., None] * values).sum(0).float().to(DEVICE)
        wanted_lse[first : first + count] = logs.logsumexp(0).float()
    assert torch.allclose(out.flatten(0, 1), wanted, atol=1e-5)
    assert torch.allclose(lse.flatten().cpu(), wanted_lse, atol=1e-5)
