"""Interval masks beside FlexAttention: one row a measurement in a CSV.

    quantpage bench masks --sizes 8192,32768 --out benchmarks/results/h200-masks.csv

Each kind is first held to float64 (quantpage.agreement); a red check stops the run. One
request of ``size`` tokens, all of them new, over an int8 cache in pages of 64 in random order.
FlexAttention gets the numbers that the cache holds, in bfloat16, dense and contiguous; its block
mask is built from our planner's tiles of 128 x 128 and its mask_mod is the kind's column form.

Times are medians of CUDA graph replays, L2 cleared in between. TFLOP/s count
4 * q_heads * head_dim operations a visible pair; ``against_causal`` compares the attention kernel's
time a visible pair, ``a_tile`` a visited tile, with the causal mask's in the same run.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantpage.agreement import allowed
from quantpage.bench import mask_flex
from quantpage.bench.cases import PAGE, checked_error, last_queries, relative_error
from quantpage.bench.mask_kinds import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    SCALE,
    Made,
    kinds,
    make,
    visible_pairs,
)
from quantpage.bench.rows import Rows, environment
from quantpage.bench.timing import cold_microseconds
from quantpage.masks import CausalMask, ColumnIntervals, Mask, tree_verification
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.decode import triton as triton_decode
from quantpage.ops.attend.interval import gluon as gluon_flash_mask
from quantpage.ops.attend.interval import triton as triton_flash_mask
from quantpage.ops.attend.interval import triton_plan as triton_mask_plan
from quantpage.ops.attend.interval.plan import MaskTile
from quantpage.ops.attend.prefill import gluon as gluon_prefill
from quantpage.ops.attend.results import results_for
from quantpage.ops.gather.triton import gather_layer

FLEX_GATE = 1.5e-2
"""|FlexAttention - ours| / |ours|: bfloat16 keys, values and outputs round to 2^-9 each."""
LONG = 65536
"""Past this many tokens only three kinds are measured, unless --kinds names them."""
CHECKED = 1800
DECODE = (16, 8192)
"""Requests and context of a decode or verification step."""
TREE = (-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7)
"""A draft tree: what each of its nodes continues."""
Result = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MaskRow:
    """One measurement."""

    kind: str
    tokens: int
    requests: int
    new: int
    implementation: str
    part: str
    microseconds: float
    visible_pairs: int
    tflops: float
    visited_tiles: int | str = ""
    """Tiles of 128 packed rows x 128 keys a kv_head that the planner lists."""
    partial_tiles: int | str = ""
    all_tiles: int | str = ""
    against_causal: float | str = ""
    a_tile: float | str = ""


def row_of(
    kind: str, made: Made, who: tuple[str, str], us: float, pairs: int, **more: Any
) -> MaskRow:
    """A row of one step; who: implementation and part."""
    lens, contexts = made.batch.query_lens, made.batch.host_context_lens
    tflops = round(4 * Q_HEADS * HEAD_DIM * pairs / us / 1e6, 1)
    shape = (contexts[0], len(lens), lens[0])
    return MaskRow(kind, *shape, *who, round(us, 1), pairs, tflops, **more)


def check(name: str, mask: ColumnIntervals, made: Made) -> None:
    """Both implementations against float64, whole and for the last 333 queries."""
    n = made.q.shape[0]
    params = AttendParams(SCALE, mask)
    new = min(n, 333)
    tail = last_queries(made.batch, new)
    for first, step in ((0, made.batch), (n - new, tail)):
        q = made.q[first:]
        wanted = allowed(q, made.layer, step, params)
        for attend in (gluon_flash_mask.attend, triton_flash_mask.attend):
            out, lse = attend(q, made.layer, step, params)
            error, who = relative_error(out, wanted.want), attend.__module__.rsplit(".")[-1]
            print(f"check {name} {who} {first}: {error:.1e}")
            if said := wanted.wrong(out, lse):
                raise ValueError(f"{name} {who} {first}: {said}")


def causal_rows(made: Made, n: int) -> Iterator[MaskRow]:
    """What the kinds are compared with: the flash backend, and the gather that both begin with."""
    params = AttendParams(SCALE, CausalMask())
    us = cold_microseconds(lambda: gluon_prefill.attend(made.q, made.layer, made.batch, params))
    yield row_of("causal", made, ("flash", "attend"), us, n * (n + 1) // 2)
    span = torch.tensor([[0, 0, n, n, 0]], dtype=torch.int32, device="cuda")
    rows = [torch.empty(KV_HEADS, n, HEAD_DIM, device="cuda").half() for _ in "kv"]
    table, outs = made.batch.page_table, (rows[0], rows[1])
    us = cold_microseconds(lambda: gather_layer(made.layer, table, span, n, outs))
    yield row_of("any", made, ("flash_mask", "gather"), us, 0)


def kind_rows(
    name: str, mask: ColumnIntervals, made: Made, n: int, causal: MaskRow | None
) -> Iterator[MaskRow]:
    """The planner, the attention kernel and the whole call of one kind.

    causal: the kernel's row of the causal mask, whose times a pair and a tile are 1.
    """
    pairs, tile = visible_pairs(mask, n), MaskTile(128, 128)
    form = triton_flash_mask.lowered(mask, made.q.device)

    def plan() -> tuple:
        planned = triton_mask_plan.plan_tiles(form, made.batch, GROUP, tile)
        return planned, triton_mask_plan.visit_order(planned)

    yield row_of(name, made, ("flash_mask", "planner"), cold_microseconds(plan), pairs)
    planned, order = plan()
    full, partial = planned.counts.sum((0, 1)).tolist()
    us = cold_microseconds(_kernel(made, AttendParams(SCALE, mask), (planned, form, order)))
    row = row_of(
        name, made, ("flash_mask", "kernel"), us, pairs, visited_tiles=full + partial,
        partial_tiles=partial, all_tiles=planned.tiles.numel(),
    )  # fmt: skip
    base = row if causal is None else causal
    yield replace(
        row,
        against_causal=_ratio(us, pairs, base.microseconds, base.visible_pairs),
        a_tile=_ratio(us, full + partial, base.microseconds, int(base.visited_tiles)),
    )
    params = AttendParams(SCALE, mask)
    us = cold_microseconds(lambda: gluon_flash_mask.attend(made.q, made.layer, made.batch, params))
    yield row_of(name, made, ("flash_mask", "attend"), us, pairs)


def _ratio(us: float, work: int, base_us: float, base_work: int) -> float:
    return round(us / work / (base_us / base_work), 3)


def _kernel(made: Made, params: AttendParams, planned: tuple) -> Callable[[], None]:
    """The attention kernel alone, over a workspace that is not filled again."""
    tile = MaskTile(128, 128)
    lens = (made.batch.query_lens, made.batch.host_context_lens)
    step = gluon_flash_mask.mask_step(*lens, GROUP, tile, "cuda:0")
    heads = gluon_flash_mask.heads_a_pass(KV_HEADS, step.rows * HEAD_DIM * 4)
    k, v = (torch.randn(heads, step.rows, HEAD_DIM, device="cuda").half() for _ in "kv")
    results = results_for(made.q, HEAD_DIM, True)

    def run() -> None:
        for head in range(0, KV_HEADS, heads):
            count = min(heads, KV_HEADS - head)
            rows = (k[:count], v[:count])
            gluon_flash_mask.launch(made.q, rows, results, params, (step, *planned), head)

    return run


def flex_row(name: str, mask: ColumnIntervals, made: Made, n: int) -> MaskRow:
    """FlexAttention on the same mask, after its result was compared with ours."""
    run = mask_flex.runner(mask, made, n)
    ours, _ = gluon_flash_mask.attend(made.q, made.layer, made.batch, AttendParams(SCALE, mask))
    error = relative_error(run()[0].transpose(0, 1), ours)
    if not error < FLEX_GATE:
        raise ValueError(f"{name}: expected FlexAttention within {FLEX_GATE}, got {error:.1e}")
    return row_of(
        name, made, ("FlexAttention bf16", "attend"), cold_microseconds(run), visible_pairs(mask, n)
    )


def size_rows(n: int, names: list[str], flex: bool) -> Iterator[MaskRow]:
    """Every part of every kind at one size."""
    made, every, causal = make(n), kinds(n), None
    yield from causal_rows(made, n)
    for name in names:
        for row in kind_rows(name, every[name], made, n, causal):
            if causal is None and row.part == "kernel":
                causal = row
            yield row
        if flex:
            yield flex_row(name, every[name], made, n)


def step_rows() -> Iterator[MaskRow]:
    """Decode and verification of draft trees: the flash backend's kernel, then masks."""
    requests, context = DECODE
    for new, part in ((1, "decode"), (len(TREE), "verification")):
        made = make(context, new, requests)
        named: dict[str, Mask] = {"causal": CausalMask()}
        if new == 1:
            wanted = ("causal", "sliding_window", "causal_document", "random_eviction")
            every = kinds(context)
            named |= {f"{name} columns": every[name] for name in wanted}
        else:
            named["tree"] = tree_verification(context - new, TREE)
        for name, mask in named.items():
            seen = mask.materialize(torch.arange(context - new, context), context)
            module: Any = triton_decode if name == "causal" else triton_flash_mask
            params = AttendParams(SCALE, mask)
            got = module.attend(made.q, made.layer, made.batch, params)
            checked_error(f"{part} {name}", got, made.q, made.layer, made.batch, params)

            def run(module: Any = module, made: Made = made, params: Any = params) -> Result:
                return module.attend(made.q, made.layer, made.batch, params)

            who = ("flash" if name == "causal" else "flash_mask", part)
            yield row_of(name, made, who, cold_microseconds(run), int(seen.sum()) * requests)


def compile_flex(sizes: Sequence[int], part: tuple[int, int]) -> None:
    """Fill FlexAttention's compile cache; part (i, n): every n-th (form, size) from the i-th on."""
    first, stride = part
    jobs = []
    for n in sizes:
        by_form = {mask_flex.form_of(mask): (n, mask) for mask in kinds(n).values()}
        jobs += list(by_form.values())
    for n, mask in jobs[first::stride]:
        mask_flex.runner(mask, make(n), n)()


@dataclass(frozen=True, slots=True)
class MasksRequest:
    """What the flags of `quantpage bench masks` say."""

    sizes: tuple[int, ...] = (8192, 32768)
    kinds: tuple[str, ...] = ()
    """Causal first; empty: all."""
    steps: bool = False
    """Decode and verification too."""
    out: Path | None = None
    commit: str = ""
    """Of the rows, where git is not at hand."""
    flex: bool = True
    check: bool = True
    time: bool = True
    """False: only check."""


def measured(given: MasksRequest) -> Iterator[MaskRow]:
    """Every row that is asked for."""
    if given.check:
        made = make(CHECKED)
        for name, mask in kinds(CHECKED).items():
            check(name, mask, made)
    if not given.time:
        return
    if given.steps:
        yield from step_rows()
    for n in given.sizes:
        names = list(given.kinds or kinds(1024))
        if n > LONG and not given.kinds:
            names = ["causal", "causal_document", "sliding_window"]
        yield from size_rows(n, names, given.flex and n <= LONG)
        gc.collect()
        torch.cuda.empty_cache()


def run(given: MasksRequest) -> None:
    """Check, time, print and write the CSV."""
    shape = {"q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": PAGE}
    rows = Rows(
        given.out, environment("cuda", given.commit), kind=24, tokens=-6, implementation=18,
        part=12, microseconds=-9, tflops=-8, against_causal=-14, a_tile=-8,
    )  # fmt: skip
    for row in measured(given):
        cache = "bf16" if row.implementation.startswith("Flex") else "int8"
        rows.add({"cache": cache} | asdict(row) | shape)
