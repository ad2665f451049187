"""Decode of formats with exact pages: their launch runs beside the body's, which takes their result
in; a request may have no body at all.
"""

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    GPU,
    HOPPER,
    TIER,
    TOLERANCE,
    Step,
    assert_agrees,
    candidate,
)

# isort: split
from quantpage.formats import find_format
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.attend.decode import triton as decode
from quantpage.ops.attend.decode.launch import DecodeTiles
from tests.ops.segment_cases import make_segments, oracle

pytestmark = TIER
TRITON = candidate("decode.triton")
PAGE = 16
# Shares that cut rows, and that hold several.
BODY_TILES = [
    DecodeTiles(32, 4, 3, 1),
    DecodeTiles(16, 4, 3, 4),
    DecodeTiles(32, 4, 3, 1, min_tiles=9),
]
MASKS = [CausalMask(window=9), CausalMask(window=50, sink_tokens=20), FullMask()]
CASES = [(name, tiles, CAUSAL) for name in ("int4", "k8v4_near8") for tiles in BODY_TILES]
CASES += [("int4", tiles, mask) for tiles in BODY_TILES[:2] for mask in MASKS]


@pytest.mark.parametrize("name,tiles,mask", CASES)
def test_requests_with_and_without_a_body(name, tiles, mask, monkeypatch):
    """One page, two, three and more; drafts; a request at rest."""
    planned = decode.planned

    def fixed(q, layer, batch, params, segment, hopper=False):
        return tiles if segment == "body" else planned(q, layer, batch, params, segment, hopper)

    monkeypatch.setattr(decode, "planned", fixed)
    page = tiles.tile
    contexts = (1, page, 2 * page + 3, 9 * page + 1, 40, 14 * page)
    step = Step((1, 2, 1, 3, 0, 1), contexts, page, kv_heads=2, group=2, head_dim=32)
    form = find_format(name)
    for sinks, softcap in ((True, None), (False, 3.0)):
        q, layer, batch = make_segments(form, step, mask)
        sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
        params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
        out, lse = attend(q, layer, batch, params, TRITON)
        assert_agrees(out, lse, *oracle(q, layer, batch, params), TOLERANCE, 10 * TOLERANCE)


def test_queries_that_lie_apart():
    """They are copied by a launch between those of the body and of the exact pages."""
    step = Step((1, 2), (9 * PAGE, 40), PAGE, kv_heads=1, group=2, head_dim=32)
    q, layer, batch = make_segments(find_format("int4"), step, CAUSAL)
    params = AttendParams(q.shape[-1] ** -0.5)
    wanted, _ = attend(q, layer, batch, params, TRITON)
    apart = q.new_zeros(*q.shape, 2)
    apart[..., 0] = q
    assert torch.equal(attend(apart[..., 0], layer, batch, params, TRITON)[0], wanted)


@pytest.mark.skipif(not GPU, reason="launches run beside each other on a CUDA device")
@pytest.mark.parametrize("name", ["int4", "k8v4", "int4_near8", "k8v4_near8"])
@pytest.mark.parametrize(
    "step",
    [
        Step((1,), (1500,), 64, 8, 4, 128),
        Step((1,) * 8, (700, 33, 150, 9, 512, 64, 1, 2000), 64, 8, 4, 128),
        Step((1,) * 90, tuple(range(10, 910, 10)), 64, 8, 4, 128),
        Step((4,) * 5, (700, 33, 150, 9, 512), 64, 2, 4, 128),
    ],
    ids=lambda s: f"{len(s.queries)}x{s.queries[0]}",
)
def test_what_was_written_just_before_is_read(name, step, monkeypatch):
    """Steps in a row, each over what the one before left and over pages written between: alone, in
    order, and captured, where they overlap.
    """
    form = find_format(name)
    q, layer, batch = make_segments(form, step, CAUSAL)
    params = AttendParams(q.shape[-1] ** -0.5, CAUSAL, None, torch.randn(q.shape[1], device=DEVICE))
    runs = [TRITON] + ([candidate("decode.gluon")] if HOPPER else [])
    start, values = q.clone(), layer.exact().value
    plane = values.scale if values.scale is not None else values.codes
    kept = plane.clone()

    def steps(run, out):
        plane.copy_(kept)
        for nth in range(6):
            # Queries are the last step's outputs, and every other time pages change as well.
            attend(q, layer, batch, params, run, out=out)
            if nth % 2:
                plane.mul_(0.75)
                torch.mul(out, 0.5, out=q)
            else:
                attend(out, layer, batch, params, run, out=q)
        return q.clone()

    for run in runs:
        out = torch.empty_like(q)
        monkeypatch.setattr(decode, "OVERLAP", False)
        wanted = steps(run, out)
        monkeypatch.setattr(decode, "OVERLAP", True)
        q.copy_(start)
        assert torch.equal(steps(run, out), wanted), run.name
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = steps(run, out)
        for _ in range(20):
            q.copy_(start)
            got.fill_(torch.nan)
            graph.replay()
            assert torch.equal(got, wanted), run.name
        q.copy_(start)
