"""Steps over caches of random numbers, and the truth about them: what kernel benches measure on.

A bench on another device checks the same step: ``device`` is where everything is made.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpage.agreement import Allowed, allowed
from quantpage.batch import BatchPlan, ExactPlan, derive, plan_batch, plan_on_device
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, KVFormat, QuantSpec, find_format
from quantpage.ops.attend import AttendParams

PAGE = 64
"""Tokens a page, where a case does not say it."""
CHECKED = 32
"""Queries that are checked before anything is timed, the last of the last request."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: every request has ``new`` tokens at the end of its context."""

    requests: int
    context: int
    formats: tuple[str, ...] = ()
    """Of the cache; after a kernel's name ('gluon int8') where kernels are compared."""
    new: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = PAGE
    peers: bool = False
    rotary: int = 0
    """Channels of keys after those of latent rows, which are values as well; 0: other keys."""
    title: str = ""
    """Its name, where requests and context do not say it."""
    lengths: tuple[int, ...] = ()
    """Contexts of requests that are unlike each other, ``context`` the longest; (): all have it."""
    window: int = 0
    """The last keys that a query sees, its own included; 0: all."""

    def __post_init__(self) -> None:
        """Lengths that belong to no such requests fail here."""
        if self.lengths and (len(self.lengths), max(self.lengths)) != (self.requests, self.context):
            raise ValueError(
                f"lengths: expected {self.requests} of up to {self.context}, got "
                f"{len(self.lengths)} of up to {max(self.lengths)}"
            )

    @property
    def name(self) -> str:
        """'16 x 32k'."""
        return self.title or f"{self.requests} x {self.context // 1024}k"

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of each request."""
        return self.lengths or (self.context,) * self.requests

    @property
    def pages(self) -> list[int]:
        """Of each request."""
        return [-(-context // self.page_size) for context in self.contexts]

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
    pages = torch.tensor(case.pages, device=device)
    owned = torch.arange(max(case.pages), device=device) < pages[:, None]
    table = torch.zeros(owned.shape, dtype=torch.int32, device=device)
    table[owned] = torch.randperm(sum(case.pages), device=device).int()
    kept = None
    if exact:
        request = torch.arange(case.requests, device=device)
        kept = torch.full_like(table, -1)
        for nth, page in enumerate((pages * 0, pages - 2, pages - 1)):
            kept[request, page] = (request + nth * case.requests).int()
    return plan_on_device(
        torch.arange(case.requests + 1, device=device, dtype=torch.int32) * case.new,
        torch.tensor(case.contexts, device=device, dtype=torch.int32),
        table,
        case.page_size,
        (case.new,) * case.requests,
        case.contexts,
        kept,
    )


def last_queries(batch: BatchPlan, new: int) -> BatchPlan:
    """The step of the last request with its last ``new`` tokens alone."""
    starts = torch.tensor([0, new], dtype=torch.int32, device=batch.device)
    exact = batch.exact
    return derive(
        batch,
        query_starts=starts,
        query_lens=(new,),
        context_lens=batch.context_lens[-1:],
        host_context_lens=batch.host_context_lens[-1:],
        page_table=batch.page_table[-1:],
        slots=batch.slots[-new:],
        positions=batch.positions[-new:],
        exact=exact and ExactPlan(exact.page_table[-1:], exact.slots[-new:]),
    )


def make_layer(case: Case, name: str, device: str = "cuda") -> LayerKV:
    """One layer's random cache."""
    given = find_format(name)
    pages = sum(case.pages)
    layer = LayerKV(
        random_pages(given.key, pages, case, device), random_pages(given.value, pages, case, device)
    )
    if given.exact_pages is None:
        return layer
    near = near_pages(given, 3 * case.requests, case, device)
    return replace(layer, exact_key=near[0], exact_value=near[1])


def near_pages(
    given: KVFormat, pages: int, case: Case, device: str = "cuda"
) -> list[Tensor] | list[QuantizedPages]:
    """Exact pages of keys and of values, random, as the format keeps them."""
    if given.near is not None:
        return [random_pages(s, pages, case, device) for s in (given.near.key, given.near.value)]
    shape = (pages, case.kv_heads, case.page_size, case.head_dim)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]


def cache_bytes(layer: LayerKV) -> int:
    """Codes and scales of a layer."""
    planes = [
        plane
        for half in (layer.key, layer.value)
        for plane in (half.codes, half.scale, half.zero)
        if plane is not None
    ]
    return sum(plane.numel() * plane.element_size() for plane in planes)


def read_bytes(layer: LayerKV, case: Case) -> int:
    """What a step reads of a layer: codes and scales of the keys that its queries see, and of those
    in exact pages the exact rows in their place.
    """
    body = cache_bytes(layer) / layer.key.pages
    exact = body
    if layer.exact_key is not None:
        exact = cache_bytes(layer.exact()) / (3 * case.requests)
    total = 0.0
    for context, pages in zip(case.contexts, case.pages, strict=True):
        first = max(0, context - case.new + 1 - case.window) if case.window else 0
        # make_batch keeps them of each request.
        kept = {0, pages - 2, pages - 1}
        for page in range(first // case.page_size, pages):
            start = page * case.page_size
            seen = min(context, start + case.page_size) - max(first, start)
            total += seen / case.page_size * (exact if page in kept else body)
    return round(total)


def dense_step(k: Tensor, v: Tensor, new: int) -> tuple[LayerKV, BatchPlan]:
    """Rows [kv_heads, context, head_dim] of one request as pages in order, nothing copied, and the
    step of its last ``new`` tokens; the context is whole pages."""
    spec, (_, context, _) = FORMATS["none"].key, k.shape
    key, value = (
        QuantizedPages(spec, rows.unflatten(1, (-1, PAGE)).transpose(0, 1)) for rows in (k, v)
    )
    table = list(range(context // PAGE))
    return LayerKV(key, value), plan_batch([new], [context], [table], PAGE, k.device)


def expected(q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams) -> Allowed:
    """What the last ``CHECKED`` queries of the last request make, and how far off that may be.

    As in the tests of kernels, which multiply 16-bit rows as they are and codes in float16.
    """
    new = min(batch.query_lens[-1], CHECKED)
    dense = [half.codes.dtype for half in (layer.key, layer.value) if not half.spec.quantized]
    if isinstance(layer.exact_key, Tensor):
        dense.append(layer.exact_key.dtype)
    low = dense[0] if dense else torch.float16
    return allowed(q[-new:], layer, last_queries(batch, new), params, low)


def checked_error(
    name: str,
    got: tuple[Tensor, Tensor | None],
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
) -> float:
    """|out - exact| / |exact| of the queries that are checked; ValueError where they are wrong."""
    wanted = expected(q, layer, batch, params)
    out, lse = got[0][-len(wanted.want) :], got[1]
    if said := wanted.wrong(out, None if lse is None else lse[-len(out) :]):
        raise ValueError(f"{name}: {said}")
    return relative_error(out, wanted.want)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in float64."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
