"""Attention on the CPU: the compiled core against dense SDPA and against reading the bytes.

    quantpage bench cpu --threads 2 --out benchmarks/results/cpu-attend.csv

Rows of one case are interleaved in one process; the median of the undisturbed samples is written,
with their number (bench/timing). Layers are rotated so that most of the cache is not in a core's
own caches. Nothing is timed before its result is held to float64 (quantpage.agreement).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quantpage.agreement import allowed
from quantpage.batch import BatchPlan, plan_batch
from quantpage.bench.cases import Case, random_pages
from quantpage.bench.rows import Rows, environment
from quantpage.bench.timing import Sample, Timing, cpu_clock, sample, timing
from quantpage.cache.memory import zero_plane
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.cpu_core import ISAS, LAST_FOR_ATTENTION, core
from quantpage.formats import QuantSpec, find_format
from quantpage.formats.per_layer import LayerFormats
from quantpage.ops.attend import AttendParams, attend, cpu

sdpa = torch.nn.functional.scaled_dot_product_attention

ROTATED_BYTES = 1 << 27
"""Of codes that one case's layers have together."""


_SMOLLM2 = Case(1, 512, q_heads=9, kv_heads=3, head_dim=64)
CASES = [
    Case(8, 4096, page_size=16),
    Case(8, 16384, page_size=16),
    *(replace(_SMOLLM2, context=n, title=f"SmolLM2 {n}") for n in (512, 2048, 8192)),
    *(Case(1, n, new=n, title=f"prompt {n}") for n in (1024, 2048)),
    *(replace(_SMOLLM2, context=n, new=n, title=f"SmolLM2 prompt {n}") for n in (1024, 4096)),
    *(
        Case(
            1,
            n,
            q_heads=heads,
            kv_heads=1,
            head_dim=512,
            rotary=64,
            title=f"latent {n}, {heads} heads",
        )
        for heads, n in ((16, 4096), (16, 16384), (128, 4096))
    ),
]


def as_cached(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory as the cache allocates it."""
    return zero_plane(x.shape, x.dtype, x.device).copy_(x)


def cached_pages(spec: QuantSpec, pages: int, case: Case) -> QuantizedPages:
    """Codes that no number was quantized to, which take the same time."""
    made = random_pages(spec, pages, case, "cpu")
    scale, zero = (None if x is None else as_cached(x) for x in (made.scale, made.zero))
    return replace(made, codes=as_cached(made.codes), scale=scale, zero=zero)


def random_layer(name: str, case: Case) -> tuple[LayerKV, BatchPlan]:
    """A layer and the step over it, pages in random order, exact ones where the format has some."""
    form, pages = find_format(name), -(-case.context // case.page_size)
    beside = replace(case, head_dim=case.rotary) if case.rotary else case
    order = torch.randperm(case.requests * pages).view(case.requests, pages).tolist()
    key, value = (
        cached_pages(spec, case.requests * pages, each)
        for spec, each in ((form.key, case), (form.value, beside))
    )
    exact, exact_key, exact_value = None, None, None
    if form.exact_pages is not None:
        # The first page, those of the new tokens, and the one before.
        first = (case.context - case.new) // case.page_size - 1
        count = sum(page == 0 or page >= first for page in range(pages))
        exact = [_exact_table(pages, first, request * count) for request in range(case.requests)]
        near = form.near or find_format("none")
        exact_key, exact_value = (
            pages if spec.quantized else pages.codes
            for spec, each in ((near.key, case), (near.value, beside))
            for pages in [cached_pages(spec, case.requests * count, each)]
        )
    lens = [case.new] * case.requests, [case.context] * case.requests
    batch = plan_batch(*lens, order, case.page_size, exact_tables=exact)
    return LayerKV(key, value, exact_key, exact_value, latent=case.rotary > 0), batch


def _exact_table(pages: int, first: int, number: int) -> list[int]:
    """Logical page -> exact page, numbered from ``number``, -1 where none is kept."""
    table = []
    for page in range(pages):
        kept = page == 0 or page >= first
        table.append(number if kept else -1)
        number += kept
    return table


def gate(name: str, case: Case) -> None:
    """ValueError unless the core is right on a short version of the case."""
    context = min(case.context, 300)
    new = min(case.new, context)
    small = replace(case, requests=2, context=context, new=new)
    layer, batch = random_layer(name, small)
    q = torch.randn(2 * small.new, small.q_heads, layer.facts.query_dim) / 8
    params = AttendParams(small.head_dim**-0.5)
    wanted = allowed(q, layer, batch, params)
    for isa in range(min(core().isa, LAST_FOR_ATTENTION) + 1):
        if said := wanted.wrong(*cpu.attend(q, layer, batch, params, isa=isa)):
            raise ValueError(f"{case.name} {name}, {ISAS[isa]}: {said}")


Contenders = dict[str, Callable[[int], object]]
"""What is timed, by name; each takes the number of the sample."""


def contenders(case: Case, formats: Sequence[str]) -> Contenders:
    """Dense attention, and for each format the core's, plain torch's and reading alone."""
    codes = case.requests * case.context * case.kv_heads * case.head_dim * 2
    layers = max(1, min(16, ROTATED_BYTES // codes)) if case.new == 1 else 1
    width = case.head_dim + case.rotary
    q = torch.randn(case.requests * case.new, case.q_heads, width, dtype=torch.bfloat16)
    found = _dense(case, q, layers)
    for name in formats:
        found |= _ours(case, name, q, layers)
    return found


def _dense(case: Case, q: torch.Tensor, layers: int) -> Contenders:
    """SDPA over contiguous keys and values, of a decode step over one layer after the other."""
    shape = case.requests, case.kv_heads, case.context
    kv = [
        tuple(
            as_cached(torch.randn(*shape, channels, dtype=torch.bfloat16))
            for channels in (q.shape[-1], case.head_dim)
        )
        for _ in range(layers)
    ]
    if case.new == 1:
        grouped = q.view(case.requests, case.kv_heads, -1, q.shape[-1])
        return {"sdpa bf16": lambda i: sdpa(grouped, kv[i % layers][0], kv[i % layers][1])}
    rows = q.transpose(0, 1)[None].contiguous()
    return {
        label: partial(_prompt_sdpa, [x.to(dtype) for x in (rows, kv[0][0], kv[0][1])])
        for label, dtype in (("sdpa bf16", torch.bfloat16), ("sdpa fp32", torch.float32))
    }


def _ours(case: Case, name: str, q: torch.Tensor, layers: int) -> Contenders:
    """The core over pages of one format, in each instruction set for int8, and its limits."""
    params = AttendParams(case.head_dim**-0.5)
    made = [random_layer(name, case) for _ in range(layers)]
    run, widest = reader_of(made, q, params), min(core().isa, LAST_FOR_ATTENTION)
    found: Contenders = {f"{name} {ISAS[widest]}": run}
    if case.rotary:
        found[f"{name} torch"] = partial(plain_torch, made, q, params)
    elif name == "int8":
        found |= {f"{name} {ISAS[isa]}": partial(run, isa=isa) for isa in range(widest)}
    if case.new == 1 and name in ("int8", "int4"):
        count = sum(side.codes.nbytes for side in (made[0][0].key, made[0][0].value))
        found[f"read {name}"] = bytes_alone(count, layers)
    return found


def reader_of(
    made: list[tuple[LayerKV, BatchPlan]], q: torch.Tensor, params: AttendParams
) -> Callable[..., object]:
    """Attention of the compiled core over one layer of ``made`` after the other."""

    def run(sample: int, isa: int = core().isa) -> object:
        layer, batch = made[sample % len(made)]
        return cpu.attend(q, layer, batch, params, isa=isa)

    return run


def plain_torch(
    made: list[tuple[LayerKV, BatchPlan]], q: torch.Tensor, params: AttendParams, sample: int
) -> object:
    """What answers where there is no core."""
    layer, batch = made[sample % len(made)]
    return attend(q, layer, batch, params, "torch")


def bytes_alone(count: int, layers: int) -> Callable[[int], object]:
    """Reading so many bytes of a layer and nothing else: the limit of who reads a cache.

    Bytes of their own: what attention has just read would come from a cache.
    """
    plain = [as_cached(torch.ones(count, dtype=torch.uint8)) for _ in range(layers)]
    threads = torch.get_num_threads()
    return lambda sample: core().read(plain[sample % layers].data_ptr(), count, threads)


def _prompt_sdpa(tensors: list[torch.Tensor], _: int) -> torch.Tensor:
    q, k, v = tensors
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def measure(found: Contenders, seconds: float) -> dict[str, Timing]:
    """Seconds of a call of each, which take turns."""
    clock = cpu_clock()
    samples: dict[str, list[Sample]] = {name: [] for name in found}
    repeats = {}
    for name, run in found.items():
        run(0)
        start = time.perf_counter()
        run(1)
        repeats[name] = max(1, min(50, int(0.004 / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 5 or (time.perf_counter() < end and turn < 200):
        for name, run in found.items():
            count = repeats[name]

            def calls(run=run, first=turn, count=count) -> None:
                for number in range(first, first + count):
                    run(number)

            taken = sample(calls, clock)
            samples[name].append(taken._replace(seconds=taken.seconds / count))
        turn += 1
    return {name: timing(each) for name, each in samples.items()}


def rows_of(case: Case, seconds: float, formats: Sequence[str]) -> list[dict[str, object]]:
    """CSV rows of one case, after the gate."""
    for name in formats:
        gate(name, case)
    measured = measure(contenders(case, formats), seconds)
    rows = []
    for name, (_, median, undisturbed, samples) in measured.items():
        limit = measured.get("read " + name.split()[0])
        rows.append(
            {
                "case": case.name,
                "requests": case.requests,
                "new": case.new,
                "context": case.context,
                "q_heads": case.q_heads,
                "kv_heads": case.kv_heads,
                "head_dim": case.head_dim,
                "page_size": case.page_size,
                "threads": torch.get_num_threads(),
                "what": name,
                "microseconds": f"{median * 1e6:.1f}",
                "times_sdpa_bf16": f"{measured['sdpa bf16'].median / median:.2f}",
                "of_read_limit": "" if limit is None else f"{limit.median / median:.2f}",
                "clock": "cpu" if torch.get_num_threads() == 1 else "wall",
                "undisturbed": undisturbed,
                "samples": samples,
            }
        )
    return rows


def run(
    out: Path | None, threads: int, seconds: float, names: Sequence[str], formats: Sequence[str]
) -> None:
    """Measure, print, and write the rows as they come.

    seconds: of each case, about. names: of cases; none: all. formats: names for ``find_format``, of
    dynamic formats.
    """
    for name in formats:
        LayerFormats.of(find_format(name)).refuse_static()
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"cases: expected names of {', '.join(known)}; got {name!r}")
    torch.set_num_threads(threads)
    rows = Rows(
        out, environment("cpu"), case=20, what=16, microseconds=-10, times_sdpa_bf16=-15,
        of_read_limit=-13, undisturbed=-11, samples=-7,
    )  # fmt: skip
    for name in names or known:
        for row in rows_of(known[name], seconds, formats):
            rows.add(row)
