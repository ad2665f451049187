"""Decode over pages of every format beside kernels that read dense bfloat16, in one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpage.batch import BatchPlan, ExactPlan
from quantpage.bench.measure import (
    COLD_BYTES,
    Row,
    environment,
    graph_microseconds,
    relative_error,
)
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, QuantSpec
from quantpage.hardware import device_info
from quantpage.ops import attend as attend_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call, choose
from quantpage.ops.gather.reference import gather_request

GATE = 1e-2
"""No speed is reported above this error: bfloat16 results differ by 2e-3 to 4e-3."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: every request has ``new`` tokens at the end of ``context``."""

    requests: int
    context: int
    formats: tuple[str, ...]
    new: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    peers: bool = False

    @property
    def name(self) -> str:
        """'16 x 32k'."""
        return f"{self.requests} x {self.context // 1024}k"


_MAIN = ("none", "int8", "fp8", "int4", "k8v4", "int8_static")
_SHAPES = ((1, 4096), (1, 32768), (8, 8192), (64, 4096), (128, 1024), (16, 32768))
CASES = (
    *(Case(requests, context, _MAIN, peers=True) for requests, context in _SHAPES),
    *(Case(16, 8192, ("int8", "fp8", "int4"), new=new) for new in (1, 2, 4, 8, 16)),
    *(Case(64, 4096, ("none", "int8", "int4"), head_dim=d) for d in (64, 256)),
    Case(64, 4096, ("none", "int8", "int4"), q_heads=28, kv_heads=4),
    *(Case(64, 4096, ("int8",), page_size=p) for p in (16, 128)),
)


def random_pages(spec: QuantSpec, pages: int, case: Case) -> QuantizedPages:
    """Random codes and scales: what a cache of random numbers holds."""
    shape = (pages, case.kv_heads, case.page_size)
    if not spec.quantized:
        return QuantizedPages(
            spec, torch.randn(*shape, case.head_dim, device="cuda", dtype=torch.bfloat16)
        )
    row = spec.code.stored(case.head_dim)
    codes = torch.randint(0, 256, (*shape, row), device="cuda", dtype=torch.uint8)
    if spec.code.name == "fp8":
        # Exponents below the largest: no NaN.
        codes &= 0xBF
    assert spec.code.storage is not None
    plane = (
        (*shape, spec.granularity.groups(case.head_dim))
        if spec.dynamic
        else spec.granularity.scale_shape(case.kv_heads, case.head_dim)
    )
    scale = (torch.rand(plane, device="cuda") * 0.02 + 0.01).to(spec.scale_dtype)
    zero = scale * 0.5 if spec.zero_point else None
    return QuantizedPages(spec, codes.view(spec.code.storage), scale, zero)


def make_batch(case: Case, exact: bool) -> BatchPlan:
    """Random page order; with ``exact``, each request's first and last two pages kept."""
    pages = -(-case.context // case.page_size)
    table = torch.randperm(case.requests * pages, device="cuda").to(torch.int32)
    starts = torch.arange(case.requests + 1, device="cuda", dtype=torch.int32) * case.new
    lens = torch.full((case.requests,), case.context, device="cuda", dtype=torch.int32)
    late = torch.arange(case.context - case.new, case.context, device="cuda")
    slots = torch.zeros(case.requests * case.new, dtype=torch.int64, device="cuda")
    near = None
    if exact:
        kept = torch.full((case.requests, pages), -1, dtype=torch.int32, device="cuda")
        for nth, page in enumerate((0, -2, -1)):
            kept[:, page] = torch.arange(case.requests, device="cuda") + nth * case.requests
        near = ExactPlan(kept, slots)
    return BatchPlan(
        starts, lens, table.view(case.requests, pages), slots, late.repeat(case.requests),
        case.page_size, (case.new,) * case.requests, (case.context,) * case.requests, near,
    )  # fmt: skip


def make_layer(case: Case, name: str) -> LayerKV:
    """One layer's random cache."""
    given = FORMATS[name]
    pages = case.requests * -(-case.context // case.page_size)
    layer = LayerKV(random_pages(given.key, pages, case), random_pages(given.value, pages, case))
    if given.exact_pages is None:
        return layer
    shape = (3 * case.requests, case.kv_heads, case.page_size, case.head_dim)
    near = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
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


def measure(case: Case, name: str, copy: float, timed: bool) -> Iterator[Row]:
    """Ours for one format: a row, or nothing where only checked."""
    layers = [make_layer(case, name)]
    size = cache_bytes(layers[0])
    count = max(2, min(32, -(-COLD_BYTES // size))) if timed else 1
    layers += [make_layer(case, name) for _ in range(count - 1)]
    batch = make_batch(case, layers[0].exact_key is not None)
    q = torch.randn(
        case.requests * case.new, case.q_heads, case.head_dim, device="cuda", dtype=torch.bfloat16
    )
    params = AttendParams(case.head_dim**-0.5)
    call = Call(
        device_info("cuda"), FORMATS[name], q.dtype, case.q_heads, case.kv_heads, case.head_dim,
        case.head_dim, case.page_size, "decode",
    )  # fmt: skip
    chosen = choose(attend_op.CANDIDATES, call)
    out, _ = attend_op.attend(q, layers[0], batch, params, chosen)
    error = relative_error(
        out[-case.new :], exact_output(q, layers[0], batch, params.softmax_scale)
    )
    if not error < GATE:
        raise ValueError(f"{case.name} {name}: expected an error below {GATE}, got {error:.1e}")
    if not timed:
        return

    def run() -> None:
        for layer in layers:
            attend_op.attend(q, layer, batch, params, chosen)

    time = graph_microseconds(run, len(layers))
    yield make_row(case, f"quantpage {chosen.name}", name, time, size, copy, error)


def make_row(
    case: Case, implementation: str, name: str, time: float, size: int, copy: float, error: float
) -> Row:
    """A row of this case."""
    speed = size / time / 1e6
    return Row(
        "decode", case.name, implementation, name, case.requests, case.new, case.context,
        case.q_heads, case.kv_heads, case.head_dim, case.page_size, round(time, 2), size,
        round(speed, 3), round(speed / copy, 3), float(f"{error:.1e}"), "graph, cold L2",
        **environment(),
    )  # fmt: skip


def peers(case: Case, copy: float, flex: bool) -> Iterator[Row]:
    """torch's kernels over dense bfloat16: no pages to follow, twice the bytes."""
    shape = (case.requests, case.kv_heads, case.context, case.head_dim)
    q = torch.randn(
        case.requests, case.q_heads, 1, case.head_dim, device="cuda", dtype=torch.bfloat16
    )
    size = 2 * 2 * case.requests * case.kv_heads * case.context * case.head_dim
    count = max(2, min(32, -(-COLD_BYTES // size)))
    caches = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(count)
    ]
    keys, values = (t[-1:].double() for t in caches[0])
    wanted = F.scaled_dot_product_attention(q[-1:].double(), keys, values, enable_gqa=True)
    del keys, values
    named: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("torch SDPA cuDNN", _sdpa(q, SDPBackend.CUDNN_ATTENTION)),
        ("torch SDPA FlashAttention-2", _sdpa(q, SDPBackend.FLASH_ATTENTION)),
    ]
    if flex:
        named.append(("torch FlexAttention", _flex(q)))
    for name, run_one in named:
        try:
            error = relative_error(run_one(*caches[0])[-1:], wanted)

            def run(run_one=run_one) -> None:
                for cache in caches:
                    run_one(*cache)

            time = graph_microseconds(run, count)
        except RuntimeError as problem:
            print(f"{case.name} {name}: not run: {str(problem).splitlines()[0]}")
            continue
        yield make_row(case, name, "bf16 dense", time, size, copy, error)


def _sdpa(q: Tensor, backend: SDPBackend) -> Callable[[Tensor, Tensor], Tensor]:
    def run(keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return run


def _flex(q: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(keys: Tensor, values: Tensor) -> Tensor:
        return compiled(q, keys, values, enable_gqa=True)

    return run
