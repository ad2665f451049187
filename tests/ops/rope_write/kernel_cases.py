"""Layers to write into and what kernels wrote there, beside what the reference writes."""

from dataclasses import replace

import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import (
    FORMATS,
    KeyMap,
)
from quantpage.formats.feedback import with_feedback
from quantpage.formats.quantize import unpack
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.ops.rope_write.triton import Shape, rope_write
from tests.ops.triton_cases import DEVICE, GPU

KV_HEADS, GROUP, PAGE = 2, 3, 16
SMALL = Shape(4, 2, 2, 32, 1)
NEAR_FP8 = replace(FORMATS["fp8"].key, rotation="hadamard")


def empty_pages(spec, width, pages=8, heads=KV_HEADS):
    """Pages full of what nobody wrote."""
    if not spec.quantized:
        full = torch.full((pages, heads, PAGE, width), torch.nan, dtype=torch.float16)
        return QuantizedPages(spec, full.to(DEVICE))
    codes = torch.full(
        (pages, heads, PAGE, spec.code.stored(width)), 0x7F, dtype=torch.uint8, device=DEVICE
    )
    codes = codes.view(spec.code.storage)
    groups = spec.granularity.groups(width)
    if spec.dynamic:
        scale = torch.full((pages, heads, PAGE, groups), torch.nan, dtype=spec.scale_dtype)
        zero = scale.clone()
    else:
        shape = spec.granularity.scale_shape(heads, width)
        scale = ((torch.rand(shape) + 0.5) * 4 / spec.code.qmax).to(spec.scale_dtype)
        zero = (torch.randn(shape) * 0.1).to(spec.scale_dtype)
    zero = zero.to(DEVICE) if spec.zero_point else None
    return QuantizedPages(spec, codes, scale.to(DEVICE), zero)


def copy_of(layer):
    def own(pages):
        planes = [None if p is None else p.clone() for p in (pages.scale, pages.zero)]
        return QuantizedPages(pages.spec, pages.codes.clone(), *planes)

    exact = [
        own(p) if isinstance(p, QuantizedPages) else None if p is None else p.clone()
        for p in (layer.exact_key, layer.exact_value)
    ]
    return LayerKV(own(layer.key), own(layer.value), *exact, layer.key_map)


def same_codes(got, wanted, allowed):
    """Equal, but for a few neighbours: sums in another order move a number over a rounding tie.

    A scale may be such a number, seldom: its row's codes are then those of the neighbouring scale.
    """
    a, b = got.codes, wanted.codes
    if got.spec.quantized:
        a, b = unpack(a, got.spec.code), unpack(b, got.spec.code)
        differ = a.view(torch.uint8) != b.view(torch.uint8)
        if got.spec.dynamic:
            moved = (got.scale != wanted.scale) & ~wanted.scale.isnan()
            moved = moved.any(-1)
            assert moved.sum() <= max(1, moved.numel() // 200)
            differ = differ & ~moved[..., None]
        assert differ.sum() <= allowed
    else:
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True)
    if got.scale is not None:
        torch.testing.assert_close(got.scale, wanted.scale, rtol=2e-3, atol=2e-3, equal_nan=True)
    if got.zero is not None:
        # It is low + 8 scales (int6: 32): a neighbouring scale moves it by as many of its float16
        # steps.
        steps = -wanted.spec.code.qmin
        one, two, scale = got.zero.double(), wanted.zero.double(), wanted.scale.double()
        off = (one - two).abs() - 2e-3 * two.abs() - 2e-3 - steps * 2**-10 * scale.abs()
        assert not (off > 0).any()
        assert torch.equal(one.isnan(), two.isnan())


def random_map(head_dim, mean=True, heads=KV_HEADS):
    scale = torch.rand(heads, head_dim, device=DEVICE) * 3 + 0.05
    scale[:, ::3] *= -1
    return KeyMap(scale, torch.randn(heads, head_dim, device=DEVICE) * 30 if mean else None)


def run(key, value, params, head_dim=64, queries=(5, 1, 3), exact=False, q=True, change=None,
        allowed=4, shape=None, key_map=None, near=None):  # fmt: skip
    """near: the format of exact pages that are codes; None: they are numbers."""
    torch.manual_seed(0)
    contexts = tuple(n + 9 for n in queries)
    tables = [[3, 1], [0, 6], [5, 2]]
    exact_tables = [[0, 1], [2, 3], [4, 5]] if exact else None
    batch = plan_batch(queries, contexts, tables, PAGE, DEVICE, exact_tables)
    batch.slots[1] = -1
    tokens = sum(queries)
    # Q, K and V of one projection: rows are strided.
    width = (GROUP * KV_HEADS + 2 * KV_HEADS) * head_dim
    fused = torch.randn(tokens, width, device=DEVICE).half()
    if change is not None:
        change(fused)
    parts = fused.unflatten(1, (-1, head_dim)).split((GROUP * KV_HEADS, KV_HEADS, KV_HEADS), 1)
    layer = LayerKV(empty_pages(key, head_dim), empty_pages(value, head_dim), key_map=key_map)
    if near is not None:
        kept = [empty_pages(spec, head_dim, 6) for spec in (near.key, near.value)]
        layer = replace(layer, exact_key=kept[0], exact_value=kept[1])
    elif exact:
        pages = torch.full((6, KV_HEADS, PAGE, head_dim), torch.nan, device=DEVICE).half()
        layer = replace(layer, exact_key=pages, exact_value=pages.clone())
    other = copy_of(layer)
    given = (parts[0] if q else None, parts[1], parts[2])
    wanted = reference(*given, other, batch, params)
    got = rope_write(*given, layer, batch, params, shape=shape or (None if GPU else SMALL))
    same_codes(layer.key, other.key, allowed)
    same_codes(layer.value, other.value, allowed)
    for one, two in ((layer.exact_key, other.exact_key), (layer.exact_value, other.exact_value)):
        if near is not None:
            same_codes(one, two, allowed)
        elif exact:
            torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3, equal_nan=True)
    for one, two in zip(got, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            # One code's step where a tie fell the other way.
            off = (one.float() - two.float()).abs() > 4e-3 * two.float().abs() + 4e-3
            assert off.sum() <= allowed
    return layer


def same_rows(got, wanted) -> float:
    """Share of slots and heads that hold the same codes and scales."""
    same = (got.codes.view(torch.uint8) == wanted.codes.view(torch.uint8)).all(-1)
    if got.spec.dynamic:
        for one, two in ((got.scale, wanted.scale), (got.zero, wanted.zero)):
            if one is not None:
                same &= ((one == two) | (one.isnan() & two.isnan())).all(-1)
    return float(same.double().mean())


def feedback_map(head_dim, rotated, mean=True):
    """A map by a metric of a few directions, as queries have them."""
    noise = torch.Generator().manual_seed(9)
    metric = torch.randn(KV_HEADS, head_dim, 24, generator=noise)
    metric = (metric @ metric.mT + 0.1 * torch.eye(head_dim)).to(DEVICE)
    return with_feedback(random_map(head_dim, mean), metric, rotated)


def losses(rows, x, feedback):
    """What rows [tokens, kv_heads, head_dim] cost in the metric, beside the true ones."""
    lower = feedback.tril(-1) + torch.eye(feedback.shape[-1], device=feedback.device)
    off = torch.einsum("thj,hji->thi", rows - x, lower)
    return (off.square() * feedback.diagonal(dim1=1, dim2=2)).sum(-1)
