"""Decode over pages of every format beside kernels that read dense bfloat16, in one run."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpage.bench.cases import (
    Case,
    checked_error,
    dense_step,
    expected,
    make_batch,
    make_layer,
    read_bytes,
    relative_error,
)
from quantpage.bench.rows import Row, row_of
from quantpage.bench.timing import COLD_BYTES, graph_microseconds
from quantpage.cache.views import LayerKV
from quantpage.masks import CausalMask
from quantpage.ops import attend as attend_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import call_of, choose, phase_of

_MAIN = (
    "none", "int8", "fp8", "int6", "int4", "int4_near8", "k8v4", "k8v4_near8", "int3",
    "int8_static",
)  # fmt: skip
_SHAPES = ((1, 4096), (1, 32768), (8, 8192), (64, 4096), (128, 1024), (16, 32768))
_SKEWED = {
    # Where nothing but one request is long, and where no two are alike; the longest is checked.
    "1 x 128k and 31 x 4k": (4096,) * 31 + (131072,),
    "1 x 64k and 15 x 4k": (4096,) * 15 + (65536,),
    "1 x 100k and 63 x 512": (512,) * 63 + (102400,),
    "64 of 512 to 128k": tuple(round(512 * 256 ** (nth / 63)) for nth in range(64)),
}
CASES = (
    *(Case(requests, context, _MAIN, peers=True) for requests, context in _SHAPES),
    *(Case(16, 8192, ("int8", "fp8", "int6", "int4"), new=new) for new in (1, 2, 4, 8, 16)),
    *(Case(64, 4096, ("none", "int8", "int4"), head_dim=d) for d in (64, 256)),
    Case(64, 4096, ("none", "int8", "int4"), q_heads=28, kv_heads=4),
    *(Case(64, 4096, ("int8",), page_size=p) for p in (16, 128)),
    *(
        Case(
            len(each),
            each[-1],
            ("none", "int8", "int4", "int4_near8"),
            title=title + f", window {window // 1024}k" * (window > 0),
            lengths=each,
            window=window,
        )
        for window in (0, 4096)
        for title, each in _SKEWED.items()
    ),
)


def measure(
    case: Case,
    name: str,
    copy: float,
    timed: bool,
    op: str = "decode",
    make: Callable[[Case, str], LayerKV] = make_layer,
) -> Iterator[Row]:
    """Ours for one format: a row, or nothing where only checked. make: of one layer's cache."""
    layers = [make(case, name)]
    size, facts = read_bytes(layers[0], case), layers[0].facts
    count = max(2, min(32, -(-COLD_BYTES // size))) if timed else 1
    layers += [make(case, name) for _ in range(count - 1)]
    batch = make_batch(case, layers[0].exact_key is not None)
    shape = (case.requests * case.new, case.q_heads, facts.query_dim)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    params = AttendParams(facts.query_dim**-0.5, CausalMask(case.window or None))
    chosen = choose(attend_op.CANDIDATES, call_of(facts, case.q_heads, q.dtype, phase_of(case.new)))
    got = attend_op.attend(q, layers[0], batch, params, chosen)
    error = checked_error(f"{case.name} {name}", got, q, layers[0], batch, params)
    if not timed:
        return

    def run() -> None:
        for layer in layers:
            attend_op.attend(q, layer, batch, params, chosen)

    time = graph_microseconds(run, len(layers))
    ours = (case.name, f"quantpage {chosen.name}")
    yield row_of(op, case, name, ours, (time, size, copy, error))


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
    layer, batch = dense_step(caches[0][0][-1], caches[0][1][-1], 1)
    wanted = expected(q[-1].transpose(0, 1), layer, batch, AttendParams(case.head_dim**-0.5))
    named: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("torch SDPA cuDNN", _sdpa(q, SDPBackend.CUDNN_ATTENTION)),
        ("torch SDPA FlashAttention-2", _sdpa(q, SDPBackend.FLASH_ATTENTION)),
    ]
    if flex:
        named.append(("torch FlexAttention", _flex(q)))
    for name, run_one in named:
        try:
            out = run_one(*caches[0])[-1].transpose(0, 1)
            if said := wanted.wrong(out):
                raise RuntimeError(said)
            error = relative_error(out, wanted.want)

            def run(run_one=run_one) -> None:
                for cache in caches:
                    run_one(*cache)

            time = graph_microseconds(run, count)
        except RuntimeError as problem:
            print(f"{case.name} {name}: not run: {str(problem).splitlines()[0]}")
            continue
        yield row_of("decode", case, "bf16 dense", (case.name, name), (time, size, copy, error))


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
