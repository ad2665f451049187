"""Steps over random pages for mask tests: shuffled page tables, poison wherever nothing is."""

from dataclasses import dataclass, replace

import torch

from quantpage.batch import BatchPlan, plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, KVFormat, QuantSpec


@dataclass
class Cached:
    """Requests whose tokens are all cached; ``step`` asks for any of their queries."""

    layer: LayerKV
    q: list[torch.Tensor]
    """[context, q_heads, head_dim] of each request."""
    tables: list[list[int]]
    exact_tables: list[list[int]] | None
    page_size: int

    def step(self, chunks: list[tuple[int, int]]) -> tuple[torch.Tensor, BatchPlan]:
        """Queries [start, end) of each request over a cache that ends there too."""
        q = torch.cat([own[a:b] for own, (a, b) in zip(self.q, chunks, strict=True)])
        batch = plan_batch(
            [b - a for a, b in chunks],
            [b for _, b in chunks],
            self.tables,
            self.page_size,
            exact_tables=self.exact_tables,
        )
        return q, batch


def cached(
    format_name: str,
    contexts: list[int],
    *,
    page_size: int = 16,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Cached:
    """Pages with random codes; slots without a token hold NaN scales and garbage codes."""
    noise = torch.Generator().manual_seed(seed)
    form = FORMATS[format_name]
    counts = [-(-context // page_size) for context in contexts]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=noise).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    written = torch.zeros(pages, page_size, dtype=torch.bool)
    for table, context in zip(tables, contexts, strict=True):
        for at in range(context):
            written[table[at // page_size], at % page_size] = True
    shape = (pages, kv_heads, page_size)
    layer = LayerKV(
        *(_half(spec, (*shape, head_dim), written, dtype, noise) for spec in (form.key, form.value))
    )
    exact_tables = None
    if form.exact_pages is not None:
        exact_tables = tables
        rows = [torch.randn(*shape, head_dim, generator=noise).to(dtype) for _ in range(2)]
        for each in rows:
            each.transpose(1, 2)[~written] = torch.nan
        layer = replace(layer, exact_key=rows[0], exact_value=rows[1])
    q = [torch.randn(n, q_heads, head_dim, generator=noise).to(dtype) for n in contexts]
    return Cached(layer, q, tables, exact_tables, page_size)


def _half(spec: QuantSpec, shape, written, dtype, noise) -> QuantizedPages:
    pages, kv_heads, page_size, head_dim = shape
    if not spec.quantized:
        codes = torch.randn(shape, generator=noise).to(dtype)
        codes.transpose(1, 2)[~written] = torch.nan
        return QuantizedPages(spec, codes)
    width = spec.code.stored(head_dim)
    codes = torch.randint(0, 256, (*shape[:3], width), dtype=torch.uint8, generator=noise)
    typical = spec.code.qmax
    if spec.code.is_float:
        # 0x7f and 0xff are NaN in e4m3, and 448 is its largest number.
        small = (torch.randn(*shape[:3], width, generator=noise) * 40).to(torch.float8_e4m3fn)
        codes = torch.where(written[:, None, :, None], small.view(torch.uint8), 0x7F)
        typical = 80
    codes = codes.view(spec.code.storage)
    if codes.dtype == torch.int8:
        codes.clamp_(int(spec.code.qmin), int(spec.code.qmax))
    groups = spec.granularity.groups(head_dim)
    if spec.dynamic:
        planes = (pages, kv_heads, page_size, groups)
    else:
        planes = spec.granularity.scale_shape(kv_heads, head_dim)
    unit = 1.5 / typical
    scale = (torch.rand(planes, generator=noise) + 0.5) * unit
    zero = torch.randn(planes, generator=noise) * 0.3 if spec.zero_point else None
    kept = [each if each is None else each.to(spec.scale_dtype) for each in (scale, zero)]
    if spec.dynamic:
        for each in kept:
            if each is not None:
                each.transpose(1, 2)[~written] = torch.nan
    return QuantizedPages(spec, codes, *kept)


def formats() -> list[KVFormat]:
    """Every format there is."""
    return list(FORMATS.values())
