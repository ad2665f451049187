"""Steps over caches of random numbers, and the truth about them: what kernel benches measure on.

A bench on another device checks the same step: ``device`` is where everything is made.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, derive
from quantpage.batch_on_device import plan_on_device
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, QuantSpec
from quantpage.ops.gather.reference import gather_request


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: every request has ``new`` tokens at the end of ``context``."""

    requests: int
    context: int
    formats: tuple[str, ...] = ()
    """Of the cache; after a kernel's name ('gluon int8') where kernels are compared."""
    new: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    peers: bool = False
    title: str = ""
    """Its name, where requests and context do not say it."""

    @property
    def name(self) -> str:
        """'16 x 32k'."""
        return self.title or f"{self.requests} x {self.context // 1024}k"

    @property
    def whole(self) -> bool:
        """Whether nothing was cached before."""
        return self.new == self.context

    def operations(self, causal: bool) -> float:
        """Of the visible pairs."""
        hidden = self.new * (self.new - 1) / 2 if causal else 0
        pairs = self.requests * (self.new * self.context - hidden)
        return 4 * self.q_heads * self.head_dim * pairs


def random_pages(spec: QuantSpec, pages: int, case: Case, device: str = "cuda") -> QuantizedPages:
    """Random codes and scales: what a cache of random numbers holds."""
    shape = (pages, case.kv_heads, case.page_size)
    if not spec.quantized:
        return QuantizedPages(
            spec, torch.randn(*shape, case.head_dim, device=device, dtype=torch.bfloat16)
        )
    row = spec.code.stored(case.head_dim)
    codes = torch.randint(0, 256, (*shape, row), device=device, dtype=torch.uint8)
    if spec.code.name == "fp8":
        # Exponents below the largest: no NaN.
        codes &= 0xBF
    assert spec.code.storage is not None
    plane = (
        (*shape, spec.granularity.groups(case.head_dim))
        if spec.dynamic
        else spec.granularity.scale_shape(case.kv_heads, case.head_dim)
    )
    scale = (torch.rand(plane, device=device) * 0.02 + 0.01).to(spec.scale_dtype)
    zero = scale * 0.5 if spec.zero_point else None
    return QuantizedPages(spec, codes.view(spec.code.storage), scale, zero)


def make_batch(case: Case, exact: bool, device: str = "cuda") -> BatchPlan:
    """Random page order; with ``exact``, each request's first and last two pages kept."""
    pages = -(-case.context // case.page_size)
    table = torch.randperm(case.requests * pages, device=device).int().view(-1, pages)
    kept = None
    if exact:
        kept = torch.full_like(table, -1)
        for nth, page in enumerate((0, -2, -1)):
            kept[:, page] = torch.arange(case.requests, device=device) + nth * case.requests
    return plan_on_device(
        torch.arange(case.requests + 1, device=device, dtype=torch.int32) * case.new,
        torch.full((case.requests,), case.context, device=device, dtype=torch.int32),
        table,
        case.page_size,
        (case.new,) * case.requests,
        case.context,
        kept,
    )


def last_queries(batch: BatchPlan, new: int) -> BatchPlan:
    """The step of one request with its last ``new`` tokens alone."""
    starts = torch.tensor([0, new], dtype=torch.int32, device=batch.device)
    return derive(
        batch,
        query_starts=starts,
        query_lens=(new,),
        slots=batch.slots[-new:],
        positions=batch.positions[-new:],
    )


def make_layer(case: Case, name: str, device: str = "cuda") -> LayerKV:
    """One layer's random cache."""
    given = FORMATS[name]
    pages = case.requests * -(-case.context // case.page_size)
    layer = LayerKV(
        random_pages(given.key, pages, case, device), random_pages(given.value, pages, case, device)
    )
    if given.exact_pages is None:
        return layer
    shape = (3 * case.requests, case.kv_heads, case.page_size, case.head_dim)
    near = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
    return replace(layer, exact_key=near[0], exact_value=near[1])


def cache_bytes(layer: LayerKV) -> int:
    """Codes and scales of a layer."""
    planes = [
        plane
        for half in (layer.key, layer.value)
        for plane in (half.codes, half.scale, half.zero)
        if plane is not None
    ]
    return sum(plane.numel() * plane.element_size() for plane in planes)


def exact_output(q: Tensor, layer: LayerKV, batch: BatchPlan, scale: float) -> Tensor:
    """The last request's output in float64 over the same cache."""
    case_new, context = batch.query_lens[-1], batch.host_context_lens[-1]
    keys = gather_request(layer.key, batch.page_table[-1], context, torch.float64)
    values = gather_request(layer.value, batch.page_table[-1], context, torch.float64)
    if layer.exact_key is not None:
        near = layer.exact()
        assert batch.exact is not None
        table = batch.exact.page_table[-1].clamp_min(0)
        size = batch.page_size
        for rows, pages in ((keys, near.key), (values, near.value)):
            exact = gather_request(pages, table, context, torch.float64)
            rows[:size] = exact[:size]
            # Every new token stands in the last page.
            late = ((context - 1) // size - 1) * size
            rows[late:] = exact[late:]
    group = q.shape[1] // keys.shape[1]
    asked = q[-case_new:].double().unflatten(1, (keys.shape[1], group))
    scores = torch.einsum("thgd,khd->thgk", asked, keys) * scale
    key = torch.arange(context, device=q.device)
    hidden = key[None] > (context - case_new + torch.arange(case_new, device=q.device))[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    return torch.einsum("thgk,khd->thgd", scores.softmax(-1), values).flatten(1, 2)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in float64."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
