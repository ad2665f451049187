"""Packing views and steps for the compiled core.

What a layer or a step is told at every call is packed once, for as long as its view lives;
``struct`` packs the rest at once. That keeps a call's Python below ten microseconds.
"""

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.cpu_core.interface import LAYER, PAGES, STEP, number
from quantpage.kept import KeptWith

CODES = {
    torch.float32: number("F32"),
    torch.bfloat16: number("BF16"),
    torch.float16: number("F16"),
    torch.int8: number("INT8"),
    torch.uint8: number("INT4"),
    torch.float8_e4m3fn: number("FP8"),
}
"""Storage dtype -> the core's Code."""
PLANED = {"int6": number("INT6"), "int3": number("INT3")}
"""The same of codes whose bits lie in planes, by name."""

_NO_PAGES = (0,) * len(PAGES.fields)


def pages_fields(pages: QuantizedPages) -> tuple[int, ...]:
    """Pages, in the order of its fields. The tensors must outlive the call."""
    codes, spec = pages.codes, pages.spec
    size = codes.itemsize
    by_page, by_head, by_row, _ = codes.stride()
    code = PLANED[spec.code.name] if spec.code.fields else CODES[codes.dtype]
    head_dim = spec.code.channels(codes.shape[3])
    scale, zero = pages.scale, pages.zero
    return (
        codes.data_ptr(),
        by_page * size,
        by_head * size,
        by_row * size,
        code,
        head_dim,
        *_plane(scale, spec.dynamic),
        *_plane(zero, spec.dynamic),
        0 if scale is None else CODES[scale.dtype],
        1 if scale is None else scale.shape[-1],
        int(spec.dynamic),
        int(spec.rotation == "hadamard"),
    )


def _plane(plane: Tensor | None, dynamic: bool) -> tuple[int, int, int, int]:
    """Address and byte strides of page, head and token; a static scale may serve all heads."""
    if plane is None:
        return 0, 0, 0, 0
    size = plane.itemsize
    strides = plane.stride()
    if dynamic:
        return plane.data_ptr(), strides[0] * size, strides[1] * size, strides[2] * size
    return plane.data_ptr(), 0, strides[0] * size if plane.shape[0] > 1 else 0, 0


def float32_statics(pages: QuantizedPages) -> QuantizedPages:
    """The same pages, static scales of other dtypes as float32 (the core reads 16 and 32 bits)."""
    if pages.scale is None or pages.scale.dtype != torch.float64:
        return pages
    zero = None if pages.zero is None else pages.zero.float()
    return QuantizedPages(pages.spec, pages.codes, pages.scale.float(), zero)


def _pack_layer(layer: LayerKV) -> tuple[bytes, object]:
    halves = float32_statics(layer.key), float32_statics(layer.value)
    exact = layer.exact() if layer.exact_key is not None else None
    near = (_NO_PAGES, _NO_PAGES)
    if exact is not None:
        near = (pages_fields(exact.key), pages_fields(exact.value))
    # Static scales that were converted live as long as the addresses; the map's, as the view.
    mapped = layer.key_map
    names = ("scale", "mean", "feedback", "turn", "unturn")
    planes = (None if mapped is None else getattr(mapped, name) for name in names)
    scale, mean, feedback, turn, unturn = (0 if x is None else x.data_ptr() for x in planes)
    record = LAYER.pack(
        key=pages_fields(halves[0]),
        value=pages_fields(halves[1]),
        exact_key=near[0],
        exact_value=near[1],
        map_scale=scale,
        map_mean=mean,
        feedback=feedback,
        map_turn=turn,
        map_unturn=unturn,
    )
    return record, halves


def _pack_step(batch: BatchPlan) -> bytes:
    exact, page_table = batch.exact, batch.page_table
    return STEP.pack(
        page_table=page_table.data_ptr(),
        table_stride=page_table.stride(0),
        exact_table=0 if exact is None else exact.page_table.data_ptr(),
        exact_stride=0 if exact is None else exact.page_table.stride(0),
        query_starts=batch.query_starts.data_ptr(),
        context_lens=batch.context_lens.data_ptr(),
        slots=batch.slots.data_ptr(),
        exact_slots=0 if exact is None else exact.slots.data_ptr(),
        positions=batch.positions.data_ptr(),
        requests=len(batch.query_lens),
        page_size=batch.page_size,
    )


step_record = KeptWith(_pack_step)
"""The interface's Step."""
_layer = KeptWith(_pack_layer)


def layer_record(layer: LayerKV) -> bytes:
    """The interface's Layer."""
    return _layer(layer)[0]
