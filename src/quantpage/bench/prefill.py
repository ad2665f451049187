"""Prefill over quantized pages beside kernels that read bfloat16, in one run.

    quantpage bench prefill --out benchmarks/results/h200-prefill.csv

Ours includes everything that a layer's attention does in a forward: the gather of pages (in random
order) into the workspace, and every pass; formats that keep exact pages are read with these ('int4
codes': without). Peers (bench/prefill_peers) read bfloat16: pages, in
random order too ('bf16 pages'), or contiguous rows ('bf16'), which no cache of pages has. Each row
is held to float64 first (bench/cases); a red check is written as such and not timed.

A Hopper GPU under this load is held back by its power limit, and by how warm it is: implementations
take turns in another order every round, ``--rounds`` times, each long enough to settle, and a row
is the median of its turns (``--rest``: of first calls after a rest, at a higher clock).

TFLOP/s count 4 * q_heads * head_dim operations a visible pair; torch's cuDNN has no causal mask
that ends at the last query, so that it runs chunks unmasked and is credited with the pairs it
computes (``pairs``).
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from quantpage.agreement import Allowed
from quantpage.batch import BatchPlan, plan_batch
from quantpage.bench.cases import (
    PAGE,
    Case,
    dense_step,
    expected,
    near_pages,
    relative_error,
)
from quantpage.bench.prefill_peers import PEERS
from quantpage.bench.rows import Rows, environment, name_absent
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import QuantSpec, find_format
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.params import NEAR_PAGES
from quantpage.ops.attend.prefill import gluon as gluon_prefill
from quantpage.ops.attend.prefill import triton as triton_prefill

WARM_MS = 100
"""Before a turn is timed, so that what ran before does not show: the power limit settles in 60 to
100 ms (measured in blocks of 20 ms, after a rest and after a slower kernel)."""


class Call(NamedTuple):
    """What is timed."""

    run: Callable[[], Any]
    error: float
    """|out - exact| / |exact| of the queries that are checked."""
    wrong: str
    """What is off; empty where it may be timed."""
    operations: float
    """That it is credited with."""


ABSENT = {
    "FlashAttention-3, as vLLM ships it": "vllm",
    "FlashAttention-4": "flash_attn.cute",
    "FlashInfer": "flashinfer",
    "cuDNN's frontend": "cudnn",
}


OURS = ("gluon int8", "gluon fp8", "gluon int4", "gluon int4 codes", "gluon k8v4", "gluon none")
ALL = (*OURS, "triton int8", "triton int4 codes")
ONE = ("gluon int8",)
CASES = (
    Case(4, 4096, OURS, new=4096),
    Case(1, 16384, ALL, new=16384),
    Case(1, 65536, OURS, new=65536),
    Case(1, 32768, ALL, new=2048, title="2k on 32k"),
    Case(1, 32768, OURS, new=512, title="512 on 32k"),
    Case(1, 131072, ONE, new=2048, title="2k on 128k"),
    Case(1, 131072, OURS, new=512, title="512 on 128k"),
    Case(1, 16384, ONE, new=16384, head_dim=64, title="1 x 16k, dim 64"),
    Case(1, 16384, ONE, 16384, 16, 4, 256, title="1 x 16k, dim 256"),
)


def make_half(spec: QuantSpec, pages: int, case: Case) -> QuantizedPages:
    """Codes that a standard normal would have, made where they are used."""
    shape = (pages, case.kv_heads, PAGE, case.head_dim)
    numbers = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if not spec.quantized:
        return QuantizedPages(spec, numbers)
    scale = torch.empty(*shape[:3], 1, device="cuda", dtype=torch.float16)
    zero = torch.zeros_like(scale) if spec.zero_point else None
    if spec.code.name == "int4":
        scale.fill_(6 / 15)
        nibbles = (numbers.float() / scale).round().clamp(-8, 7).add(8).to(torch.uint8)
        codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    elif spec.code.name == "fp8":
        scale.fill_(4 / 448)
        codes = (numbers.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        scale.fill_(4 / 127)
        codes = (numbers.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return QuantizedPages(spec, codes, scale, zero)


def make_layer(name: str, case: Case) -> tuple[LayerKV, BatchPlan]:
    """Pages of one format in random order, and where it keeps exact ones those too: each request's
    first, and all that a new token stands in or sees exactly; name: 'int4', 'int4 codes'."""
    each = -(-case.context // PAGE)
    order = torch.randperm(each * case.requests).tolist()
    tables = [order[r * each : (r + 1) * each] for r in range(case.requests)]
    given = find_format(name.removesuffix(" codes"))
    key, value = (make_half(spec, len(order), case) for spec in (given.key, given.value))
    layer = LayerKV(key, value)
    lens = (case.new,) * case.requests, (case.context,) * case.requests
    if given.exact_pages is None or name.endswith(" codes"):
        return layer, plan_batch(*lens, tables, PAGE, "cuda")
    exact = exact_tables(case)
    near = near_pages(given, 1 + max(map(max, exact)), case)
    layer = replace(layer, exact_key=near[0], exact_value=near[1])
    return layer, plan_batch(*lens, tables, PAGE, "cuda", exact)


def exact_tables(case: Case) -> list[list[int]]:
    """Exact page of each request's logical pages, -1 where none is kept: the first are, and those
    near to a new token."""
    near = max((case.context - case.new) // PAGE - NEAR_PAGES, 0)
    numbers = itertools.count()
    return [
        [next(numbers) if page == 0 or page >= near else -1 for page in range(pages)]
        for pages in case.pages
    ]


def checked(run: Callable[[], Any], out: Tensor, wanted: Allowed, operations: float) -> Call:
    """What may be timed, by the last rows of ``out`` [tokens, q_heads, head_dim]."""
    last = out[-len(wanted.want) :]
    return Call(run, relative_error(last, wanted.want), wanted.wrong(last), operations)


def ours(name: str, case: Case, q: Tensor, params: AttendParams) -> Call:
    """Our attention over pages of one format; name: 'gluon int8', 'gluon int4 codes'."""
    kernel, format_name = name.split(maxsplit=1)
    attend = (gluon_prefill if kernel == "gluon" else triton_prefill).attend
    layer, batch = make_layer(format_name, case)
    tokens = q.transpose(1, 2).reshape(-1, case.q_heads, case.head_dim).contiguous()

    def call():
        return attend(tokens, layer, batch, params)

    wanted = expected(tokens, layer, batch, params)
    return checked(call, call()[0], wanted, case.operations(causal=True))


def calls_of(case: Case, flex: bool) -> dict[tuple[str, str], Call]:
    """(implementation, format) -> what runs this shape; peers that refuse it are named and left."""
    torch.manual_seed(0)
    shape = (case.requests, case.kv_heads, case.context, case.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    size = (case.requests, case.q_heads, case.new, case.head_dim)
    q = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    params = AttendParams(case.head_dim**-0.5)
    dense, step = dense_step(k[-1], v[-1], case.new)
    wanted = {
        causal: expected(q[-1].transpose(0, 1), dense, step, replace(params, mask=mask))
        for causal, mask in ((True, CausalMask()), (False, FullMask()))
    }
    calls: dict[tuple[str, str], Call] = {}
    for name in PEERS if flex else (name for name in PEERS if "Flex" not in name):
        try:
            peer = PEERS[name](case, q, k, v)
            out = peer.call()[-1].transpose(0, 1)
        except (RuntimeError, ImportError) as refusal:
            print(f"{case.name}: {name} refuses: {str(refusal).splitlines()[0]}", flush=True)
            continue
        causal = peer.operations == case.operations(causal=True)
        calls[name, peer.reads] = checked(peer.call, out, wanted[causal], peer.operations)
    for name in case.formats:
        kernel, kv_format = name.split(maxsplit=1)
        calls[kernel, kv_format] = ours(name, case, q, params)
    return calls


def settled_ms(call: Callable[[], Any]) -> float:
    """Median time once the card has settled on this load."""
    return do_bench(call, WARM_MS, rep=40, return_mode="median")


def rested_ms(call: Callable[[], Any], rest: float) -> float:
    """Median of the first five calls after ``rest`` seconds without load: the clock is high."""
    torch.cuda.synchronize()
    time.sleep(rest)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measure(case: Case, rounds: int, rest: float | None, flex: bool) -> list[dict]:
    """All implementations of one shape, taking turns."""
    calls = calls_of(case, flex)
    times: dict = {key: [] for key in calls}
    for turn in range(rounds):
        # Another order in every round: who runs after a slow one finds a cooler card.
        for key in random.Random(turn).sample(list(calls), len(calls)):
            call = calls[key]
            if not call.wrong:
                taken = settled_ms(call.run) if rest is None else rested_ms(call.run, rest)
                times[key].append(taken)
    middle = {key: statistics.median(each) for key, each in times.items() if each}
    speed = {key: calls[key].operations / ms for key, ms in middle.items()}
    base = speed["cuDNN", "bf16"]
    paged = max((each for key, each in speed.items() if key[1] == "bf16 pages"), default=None)
    rows = []
    for key, (_, error, wrong, operations) in calls.items():
        if wrong:
            print(f"{case.name} {' '.join(key)}: {wrong}", flush=True)
        ms = middle.get(key)
        row = {
            "case": case.name, "requests": case.requests, "new": case.new,
            "context": case.context, "q_heads": case.q_heads, "kv_heads": case.kv_heads,
            "head_dim": case.head_dim, "implementation": key[0], "format": key[1],
            "card": "settled" if rest is None else "rested",
            "pairs": "causal" if operations == case.operations(True) else "all",
            "microseconds": f"{ms * 1e3:.1f}" if ms else "wrong",
            "tflops": f"{operations / ms / 1e9:.1f}" if ms else "",
            "of_cudnn": f"{operations / ms / base:.3f}" if ms else "",
            "of_best_paged": f"{operations / ms / paged:.3f}" if ms and paged else "",
            "error": f"{error:.1e}",
        }  # fmt: skip
        rows.append(row)
    return rows


def run(
    out: Path | None = None,
    cases: Sequence[str] = (),
    rounds: int = 3,
    rest: float | None = None,
    flex: Sequence[str] = ("1 x 16k",),
    commit: str = "",
) -> None:
    """Measure, print, and write the rows after every case.

    cases: names; none: all. rest: seconds without load before every turn; None: the card settles.
    flex: cases that FlexAttention runs too. commit: of the rows, where git is not at hand.
    """
    names = [case.name for case in CASES]
    unknown = [name for name in (*cases, *flex) if name not in names]
    if unknown:
        raise ValueError(f"cases: expected names of {', '.join(names)}; got {unknown[0]!r}")
    name_absent(ABSENT)
    rows = Rows(
        out, environment("cuda", commit), case=16, implementation=25, format=10, microseconds=-9,
        tflops=-8, of_cudnn=-8, of_best_paged=-13, error=-8,
    )  # fmt: skip
    for case in CASES:
        if not cases or case.name in cases:
            for row in measure(case, rounds, rest, case.name in flex):
                rows.add(row)
            torch.cuda.empty_cache()
