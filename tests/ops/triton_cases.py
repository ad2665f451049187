"""Layers and steps for kernel tests: random pages, every slot outside the mask poisoned.

Without a CUDA device the kernels run in Triton's interpreter: the same cases, another tier
(tests/conftest.py).
"""

from dataclasses import dataclass, replace

import pytest
import torch

from quantpage.batch import BatchPlan, plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, KVFormat, QuantSpec, find_format, quantize, quantize_static
from quantpage.masks import CausalMask, Mask
from quantpage.ops.attend import CANDIDATES, AttendParams
from quantpage.ops.attend.reference import attend as reference
from quantpage.ops.dispatch import Implementation
from quantpage.ops.operand import CODE_KINDS

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]
DEVICE = "cuda" if GPU else "cpu"
TIER = [
    pytest.mark.gpu if GPU else pytest.mark.interpreted,
    # The interpreter turns arrays of one element into scalars.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # numpy says what the hardware does silently.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN (slice|axis) encountered:RuntimeWarning"),
]


@dataclass(frozen=True)
class Step:
    """Shapes of one step."""

    queries: tuple[int, ...] = (1, 1, 1)
    contexts: tuple[int, ...] = (70, 33, 150)
    page_size: int = 16
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    value_dim: int | None = None
    scale: float = 1.0
    """Typical size of values."""


def candidate(module: str) -> Implementation:
    """Who of attend's candidates stands in a module of ops/attend: 'decode.triton'."""
    target = f"quantpage.ops.attend.{module}:attend"
    return next(each for each in CANDIDATES if each.target == target)


def make_pages(spec: QuantSpec, rows, keep, page_size: int, dtype) -> QuantizedPages:
    """rows [slots, kv_heads, D] in float32 written into pages; slots not kept hold poison."""
    _, heads, width = rows.shape
    paged = rows.view(-1, page_size, heads, width).transpose(1, 2)
    kept = keep.view(-1, page_size)[:, None, :, None]
    if not spec.quantized:
        codes = torch.where(kept, paged, torch.nan).to(dtype).contiguous()
        return QuantizedPages(spec, codes)
    if spec.dynamic:
        made = quantize(paged, spec)
        scale = torch.where(kept, made.scale, torch.nan)
        zero = None if made.zero is None else torch.where(kept, made.zero, torch.nan)
    else:
        shape = spec.granularity.scale_shape(heads, width)
        scale = ((torch.rand(shape) + 0.5) * rows.abs().max() / spec.code.qmax).to(spec.scale_dtype)
        zero = (torch.randn(shape) * 0.1 * rows.std()).to(spec.scale_dtype)
        zero = zero if spec.zero_point else None
        made = quantize_static(paged.transpose(1, 2), scale, zero, spec)
        made = made._replace(codes=made.codes.transpose(1, 2).contiguous())
    codes = torch.where(kept, made.codes.view(torch.uint8), 0x7F).view(made.codes.dtype)
    return QuantizedPages(spec, codes.contiguous(), scale, zero)


def make_step(
    key: QuantSpec, value: QuantSpec, step: Step, mask: Mask, dtype=torch.float16, seed: int = 0,
    exact: bool = False, near: KVFormat | None = None,
) -> tuple[torch.Tensor, LayerKV, BatchPlan]:  # fmt: skip
    """q, pages and plan; pages are in random order and a few belong to nobody.

    near: the format of exact pages that are codes; None: they are numbers in ``dtype``.
    """
    torch.manual_seed(seed)
    size, heads = step.page_size, step.kv_heads
    needed = [-(-c // size) for c in step.contexts]
    pages = sum(needed) + 3
    order = iter(torch.randperm(pages).tolist())
    tables = [[next(order) for _ in range(n)] for n in needed]
    keep = torch.zeros(pages * size, dtype=torch.bool)
    for table, new, context in zip(tables, step.queries, step.contexts, strict=True):
        positions = torch.arange(context - new, context)
        seen = mask.materialize(positions, context).any(0) if new else torch.zeros(context).bool()
        slots = torch.tensor(table, dtype=torch.int64)[torch.arange(context) // size] * size
        keep[(slots + torch.arange(context) % size)[seen]] = True
    value_dim = step.value_dim or step.head_dim
    k = torch.randn(pages * size, heads, step.head_dim)
    v = torch.randn(pages * size, heads, value_dim) * step.scale
    layer = LayerKV(make_pages(key, k, keep, size, dtype), make_pages(value, v, keep, size, dtype))
    exact_tables = None
    if exact:
        # The reference lets page 0 stand in for pages that are not kept: it belongs to nobody.
        k_near = [torch.zeros(size, heads, step.head_dim)]
        v_near = [torch.zeros(size, heads, value_dim)]
        exact_tables, kept_pages = [], 1
        for table, new, context in zip(tables, step.queries, step.contexts, strict=True):
            own = {0} | {p // size - d for p in range(context - new, context) for d in (0, 1)}
            row = []
            for logical, page in enumerate(table):
                row.append(kept_pages if logical in own else -1)
                if logical in own:
                    kept_pages += 1
                    rows = slice(page * size, (page + 1) * size)
                    live = keep[rows, None, None]
                    k_near.append(torch.where(live, k[rows] + 0.1, torch.nan))
                    v_near.append(torch.where(live, v[rows] + 0.1, torch.nan))
            exact_tables.append(row)
        specs = (_PLAIN, _PLAIN) if near is None else (near.key, near.value)
        made = []
        for spec, kept in zip(specs, (k_near, v_near), strict=True):
            rows = torch.cat(kept)
            known = ~rows.isnan().flatten(1).any(1)
            half = make_pages(spec, rows, known, size, dtype)
            made.append(half.codes if near is None else half)
        layer = LayerKV(layer.key, layer.value, *made)
    batch = plan_batch(step.queries, step.contexts, tables, size, DEVICE, exact_tables)
    q = torch.randn(sum(step.queries), heads * step.group, step.head_dim).to(dtype)
    return q.to(DEVICE), to_device(layer), batch


def to_device(layer: LayerKV) -> LayerKV:
    """The same layer where the kernels run."""

    def moved(pages: QuantizedPages) -> QuantizedPages:
        planes = [None if p is None else p.to(DEVICE) for p in (pages.scale, pages.zero)]
        return QuantizedPages(pages.spec, pages.codes.to(DEVICE), *planes)

    exact = [
        moved(p) if isinstance(p, QuantizedPages) else None if p is None else p.to(DEVICE)
        for p in (layer.exact_key, layer.exact_value)
    ]
    return LayerKV(moved(layer.key), moved(layer.value), *exact)


CAUSAL = CausalMask()
_PLAIN = FORMATS["none"].key
KERNEL_FORMATS = [
    name
    for name, given in FORMATS.items()
    if {given.key.code.name, given.value.code.name} <= set(CODE_KINDS)
]
"""Formats whose codes the kernels read; the others they refuse (test_dispatch)."""
GROUPED_FORMATS = [
    name
    for name, given in FORMATS.items()
    if any(each.dynamic and each.granularity.group for each in (given.key, given.value))
]
"""Several scales a token and kv_head, which the kernels of decode refuse."""
HOPPER_FORMATS = [
    name
    for name in KERNEL_FORMATS
    if {FORMATS[name].key.code.name, FORMATS[name].value.code.name} <= {"int8", "fp8", "int4"}
    and name not in GROUPED_FORMATS
]
"""Those that the Hopper kernel of decode reads."""
NEAR_FORMATS = [find_format(name) for name in ("int4_near8", "k8v4_near8", "k=fp8,v=int4_near8")]
"""Some that keep exact pages as codes."""


def relative(got, wanted) -> float:
    """|got - wanted| / |wanted|; NaN where either is not finite and the other is."""
    difference = got.double().cpu() - wanted.double().cpu()
    return (difference.norm() / wanted.double().norm().clamp_min(1e-30)).item()


# float16 operands and probabilities: eleven bits, summed over a context.
TOLERANCE = 1e-3


def check_decode(key, value, step, mask=CAUSAL, softcap=None, sinks=False, tiles=None, dtype=None,
                 tolerance=TOLERANCE, run=None):  # fmt: skip
    """A decode launch of this shape (None: the planner's) against the float64 reference.

    run: an implementation; None: Triton's.
    """
    from quantpage.ops.attend.decode.triton import attend

    attend = run or attend
    q, layer, batch = make_step(key, value, step, mask, dtype or torch.float16)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted = reference(q.double(), layer, batch, params)
    assert out.dtype == q.dtype
    assert_agrees(out, lse, *wanted, tolerance, 10 * tolerance)


def assert_agrees(out, lse, wanted, wanted_lse, tolerance: float, lse_tolerance: float) -> None:
    """Results of a kernel and of the float64 reference; rows that saw nothing are 0 and -inf."""
    assert lse.dtype == torch.float32
    assert relative(out, wanted) < tolerance
    empty = wanted_lse.isneginf()
    assert torch.equal(lse.cpu().isneginf(), empty)
    assert (out.cpu()[empty] == 0).all()
    assert (lse.cpu() - wanted_lse)[~empty].abs().max() < lse_tolerance


def check_replays(given, step: Step, run=None) -> None:
    """A graph of a decode step, captured once, replayed with other queries and lengths.

    run: an implementation; None: Triton's.
    """
    from quantpage.ops.attend.decode.triton import attend

    attend = run or attend
    q, layer, batch = make_step(given.key, given.value, step, CAUSAL)
    params = AttendParams(q.shape[-1] ** -0.5)
    attend(q, layer, batch, params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, layer, batch, params)
    new = step.queries[0]
    for shorter in (0, 13, 0):
        lens = [max(new, c - shorter) for c in step.contexts]
        batch.context_lens.copy_(torch.tensor(lens))
        q.normal_()
        out.fill_(torch.nan)
        graph.replay()
        late = torch.cat([torch.arange(n - new, n) for n in lens]).to(DEVICE)
        now = replace(batch, host_context_lens=tuple(lens), positions=late)
        wanted, wanted_lse = reference(q.double(), layer, now, params)
        assert relative(out, wanted) < TOLERANCE
        assert (lse.cpu() - wanted_lse).abs().max() < 1e-2


def in_a_wider_cell(layer: LayerKV, page_size: int) -> LayerKV:
    """The same layer with K and V codes of a (page, head) side by side."""
    cell = torch.cat([layer.key.codes, layer.value.codes], 2)
    k, v = cell.split(page_size, 2)
    return replace(layer, key=replace(layer.key, codes=k), value=replace(layer.value, codes=v))


def far_away(layer: LayerKV, batch: BatchPlan) -> tuple[LayerKV, BatchPlan]:
    """The same pages of int8 past 2^31 elements of theirs."""
    pages = 2**31 // layer.key.codes[0].numel() + 64
    first = pages - layer.key.pages

    def far(given):
        codes = torch.empty(pages, *given.codes.shape[1:], dtype=torch.int8, device=DEVICE)
        scale = torch.empty(pages, *given.scale.shape[1:], dtype=torch.float16, device=DEVICE)
        codes[first:], scale[first:] = given.codes, given.scale
        return replace(given, codes=codes, scale=scale)

    moved = replace(layer, key=far(layer.key), value=far(layer.value))
    return moved, replace(batch, page_table=batch.page_table + first)
