"""The decode path's host side: views in, one launch or two, nothing read back.

Launch arguments are host integers that do not depend on the lengths (upper bounds under CUDA
graphs); the workspace of partial results belongs to the device and the stream and is kept.
"""

from dataclasses import replace

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend.decode.launch import DecodeTiles, decode_tiles, row_tiles
from quantpage.ops.attend.decode.triton_kernel import decode_kernel
from quantpage.ops.attend.params import SEGMENTS, AttendParams, Segment
from quantpage.ops.attend.triton_merge import merge_cuts_kernel
from quantpage.ops.checks import Needs, attends
from quantpage.ops.gpu_candidates import decode_refusals
from quantpage.ops.operand import STATIC, Operand, operand

# In what the Hopper kernel reads codes, where it is not words.
KEY_UNITS = {"int8": torch.int8, "int4": torch.int8}
VALUE_UNITS = {"int4": torch.int16}

OVERLAP = True
"""Programmatic dependent launch where the device has it: the merge is set up while decode runs."""

COUNTERS = 2**20
"""Counters of a device's pool (4 MB), of which each stream takes its part."""

_counters: dict[tuple[int | None, int], list[Tensor]] = {}
_pools: dict[int | None, Tensor] = {}
_workspaces: dict[tuple[int | None, int], list[Tensor]] = {}


@attends(Needs(decode_refusals, kind="cuda"))
def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
    tiles: DecodeTiles | None = None,
    earlier: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output and natural log-sum-exp. Segments keep float32, to be merged; 'all' is in q's dtype.

    earlier: the body's result, contiguous, which the exact segment's call makes whole.
    tiles: the launch's shape; None: the planner's choice. Calls on one stream share a workspace, so
    two graphs captured on one stream must not be replayed at the same time.
    """
    mask = params.mask
    if not isinstance(mask, CausalMask | FullMask):
        raise ValueError(f"mask: expected a causal or full mask, got {mask.kind}")
    tokens, q_heads, width = q.shape
    kv_heads, value_width = layer.kv_heads, layer.value.head_dim
    group = q_heads // kv_heads
    final = segment == "all" or earlier is not None
    assert earlier is None or not layer.value.spec.quantized
    out_dtype = q.dtype if final else torch.float32
    out = torch.empty(tokens, q_heads, value_width, dtype=out_dtype, device=q.device)
    lse = torch.empty(tokens, q_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    rows, tiles_of_rows = row_tiles(group, batch.max_query_len)
    all_rows = batch.num_requests * kv_heads * tiles_of_rows
    if tiles is None:
        specs = (layer.key.spec, layer.value.spec)
        keys = kv_heads * sum(batch.host_context_lens)
        tiles = decode_tiles(
            *specs, max(width, value_width), rows, keys, all_rows, _has_wgmma(q, value_width)
        )
        if segment == "exact":
            # Three pages a query: a program reads them all.
            tiles = replace(tiles, whole=True, gather=0)
    processors = device_info(q.device).processors if q.is_cuda else 3
    programs = processors * tiles.programs_per_processor
    programs = min(programs, all_rows) if tiles.whole else programs
    part_out, part_lse, cuts = _workspace(
        q.device, (2 * programs * rows * value_width, 2 * programs * rows, 2 * all_rows)
    )
    gather = tiles.gather
    if gather:
        groups = -(-programs // gather)
        cuts = _counters_of(q.device, all_rows + 2 * groups)
    window = mask.window if isinstance(mask, CausalMask) else None
    sink_tokens = mask.sink_tokens if isinstance(mask, CausalMask) and window is not None else 0
    mask_numbers = (window or 0, sink_tokens)
    # Pieces that a row is cut into, which the merge takes at once if they are few.
    pieces = programs // all_rows + 2
    parts = min(128, max(4, triton.next_power_of_2(pieces)))
    overlap = OVERLAP and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    q = q if q.stride(-1) == 1 else q.contiguous()
    key_units, value_units = (KEY_UNITS, VALUE_UNITS) if tiles.wgmma else ({}, {})
    k = operand(layer.key, key_units.get(layer.key.spec.code.name, torch.int32))
    v = operand(layer.value, value_units.get(layer.value.spec.code.name, torch.int32))
    given = (
        q, k.codes, v.codes, k.scale, v.scale, k.zero, v.zero, batch.page_table,
        batch.query_starts, batch.context_lens, params.sinks if final else None,
    )  # fmt: skip
    places = (
        out, lse, part_out, part_lse, cuts, params.softmax_scale,
        params.softcap if params.softcap is not None else 1.0, batch.num_requests, kv_heads,
        tiles.min_tiles, *mask_numbers, q.stride(0), q.stride(1), *k.strides, *v.strides,
        *k.scale_strides, *v.scale_strides, batch.page_table.stride(0),
        out.stride(0), out.stride(1),
    )  # fmt: skip
    fixed = {
        "K_CODE": k.code, "K_SCALES": k.scales, "K_ZERO": k.has_zero, "K_SHARED": _shared(k),
        "V_CODE": v.code, "V_SCALES": v.scales, "V_ZERO": v.has_zero, "V_SHARED": _shared(v),
        "HEAD_DIM": width, "VALUE_DIM": value_width, "GROUP": group, "PAGE": batch.page_size,
        "ROWS": rows, "ROW_TILES": tiles_of_rows, "TILE": tiles.tile,
        "FULL": isinstance(mask, FullMask), "WINDOW": window is not None,
        "SEGMENT": SEGMENTS[segment], "SOFTCAP": params.softcap is not None,
        "SINKS": params.sinks is not None and final, "CHUNK": _chunk(batch.num_requests),
        "STAGES": tiles.stages, "OVERLAP": overlap, "num_warps": tiles.warps,
        "maxnreg": tiles.registers, "launch_pdl": overlap,
    }  # fmt: skip
    if tiles.wgmma:
        from quantpage.ops.attend.decode.gluon_kernel import decode_kernel as wgmma_kernel

        wgmma_kernel[(programs,)](*given, *places, **fixed)
    else:
        decode_kernel[(programs,)](
            *given,
            *((None, None) if earlier is None else earlier),
            *places,
            **fixed,
            EARLIER=earlier is not None,
            OLD=q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9),
            PAIRS=_paired(layer.key) and _paired(layer.value),
            GATHER=gather,
            WHOLE=tiles.whole,
            # One query a request: what it does not see is not loaded.
            HIDES=not layer.value.spec.quantized and batch.max_query_len > 1,
        )
    if gather or tiles.whole:
        return out, lse
    # A program a query row.
    query_rows = min(rows, group * batch.max_query_len)
    merge_cuts_kernel[(all_rows, query_rows)](
        cuts,
        part_out,
        part_lse,
        batch.query_starts,
        batch.context_lens,
        params.sinks if final else None,
        out,
        lse,
        kv_heads,
        *mask_numbers,
        out.stride(0),
        out.stride(1),
        VALUE_DIM=value_width,
        GROUP=group,
        ROWS=rows,
        ROW_TILES=tiles_of_rows,
        SINKS=params.sinks is not None and final,
        PARTS=parts,
        PAGE=batch.page_size,
        FULL=isinstance(mask, FullMask),
        WINDOW=window is not None,
        SEGMENT=SEGMENTS[segment],
        OVERLAP=overlap,
        num_warps=8 if parts > 64 else 4 if parts > 8 else 1,
        launch_pdl=overlap,
    )
    return out, lse


def _has_wgmma(q: Tensor, value_width: int) -> bool:
    """Whether the Hopper kernel takes this call: sm_90, head_dims of 128 or of 256."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    return q.shape[-1] == value_width and value_width in (128, 256)


def _chunk(requests: int) -> int:
    """Requests that a program's plan holds in one vector: few sizes, so that few kernels exist."""
    return 32 if requests <= 32 else 128 if requests <= 128 else 512


def _shared(half: Operand) -> int:
    """Channels that share a static scale."""
    return half.shared if half.scales == STATIC else 1


def _paired(pages: QuantizedPages) -> bool:
    """Whether the planes of two neighbouring tokens are one aligned 32-bit word."""
    planes = [p for p in (pages.scale, pages.zero) if p is not None and pages.spec.dynamic]
    return all(
        p.dtype == torch.float16
        and p.data_ptr() % 4 == 0
        and p.stride(0) % 2 == 0
        and p.stride(1) % 2 == 0
        for p in planes
    )


def _counters_of(device: torch.device, count: int) -> Tensor:
    """Zeros that every launch leaves as zeros, this stream's own.

    They come from a pool that is filled outside of any graph: a graph that was captured with them
    may be replayed before any other. A launch that dies midway, as the device's context does with
    it, is the only one that leaves them otherwise.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _counters.setdefault((device.index, stream), [])
    if kept and kept[-1].numel() >= count:
        return kept[-1]
    size = max(2**14, triton.next_power_of_2(count))
    pool = _pools.get(device.index)
    if pool is None or pool.numel() < size:
        pool = torch.zeros(max(COUNTERS, size), dtype=torch.int32, device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # Filled by the graph itself, and so of use to this call alone.
                return pool
            torch.cuda.synchronize(device)
    # Smaller ones stay: a captured graph may still count in them.
    kept.append(pool[:size])
    _pools[device.index] = pool[size:]
    return kept[-1]


def _workspace(device: torch.device, sizes: tuple[int, int, int]):
    """Partial outputs and log-sum-exps, two pieces a program (the end of a row that began before,
    the beginning of one that goes on), and where each row's pieces are.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _workspaces.setdefault((device.index, stream), [])
    if not kept or any(t.numel() < n for t, n in zip(kept[-3:], sizes, strict=True)):
        # Smaller workspaces stay: a captured graph may still write to them.
        dtypes = (torch.float32, torch.float32, torch.int32)
        kept += [torch.empty(n, dtype=d, device=device) for n, d in zip(sizes, dtypes, strict=True)]
    return kept[-3], kept[-2], kept[-1]
