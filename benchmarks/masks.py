"""Interval masks against FlexAttention: one row a measurement in a CSV.

    python benchmarks/masks.py --sizes 8192,32768 --out benchmarks/results/h200-masks.csv

Each kind is first checked against dense attention in float32; a red check stops the run. One
request of ``size`` tokens, all of them new, over an int8 cache in pages of 64 in random order.
FlexAttention gets the numbers that the cache holds, in bfloat16, dense and contiguous; its block
mask is built from our planner's tiles of 128 x 128 and its mask_mod is the kind's column form.

TFLOP/s count 4 * q_heads * head_dim operations a visible pair.
"""

import argparse
import csv
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo
import triton
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from triton.testing import do_bench

from quantpage import masks
from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, quantize
from quantpage.masks import CausalMask, ColumnIntervals
from quantpage.ops.attend import (
    AttendParams,
    gluon_flash_mask,
    gluon_prefill,
    triton_flash_mask,
    triton_mask_plan,
)
from quantpage.ops.attend.mask_plan import MaskTile
from quantpage.ops.gather.triton_gather import gather_rows

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
GROUP = Q_HEADS // KV_HEADS
LONG = 32768
"""Past this many tokens only three kinds are measured, unless --kinds names them."""
FIELDS = (
    *("device", "torch", "triton", "commit", "kind", "tokens", "q_heads", "kv_heads", "head_dim"),
    *("cache", "implementation", "part", "microseconds", "visible_pairs", "tflops"),
    "against_causal",
)


def kinds(n: int) -> dict[str, ColumnIntervals]:
    """The twelve of FlashMask, scaled to ``n`` tokens."""
    part = n // 8
    noise = torch.Generator().manual_seed(0)
    keys = torch.arange(n)
    gone = keys + 1 + (torch.rand(n, generator=noise) * (n - keys)).long()
    return {
        "causal": masks.causal(n),
        "full": masks.full(n),
        "sliding_window": masks.sliding_window(n, part),
        "causal_document": masks.causal_document([part] * 8),
        "document": masks.document([part] * 8),
        "shared_question": masks.shared_question(part, [part] * 7),
        "global_sliding_window": masks.global_sliding_window(n, 64, part // 2),
        "causal_blockwise": masks.causal_blockwise([part] * 8),
        "prefix_lm": masks.prefix_lm(n, 2 * part + 37),
        "prefix_lm_document": masks.prefix_lm_document([(part // 4 + 5, part)] * 8),
        "qk_sparse": masks.qk_sparse(n, [(2 * part + 11, part // 2), (5 * part, part // 3)]),
        "random_eviction": masks.random_eviction(gone),
    }


def visible_pairs(mask: ColumnIntervals, n: int) -> int:
    """Pairs among n queries and n keys that the mask shows."""
    hidden = mask.hidden_rows(torch.arange(n))
    lts, lte, uts, ute = (each.clamp(max=n) for each in hidden)
    lower, upper = (lte - lts).clamp(min=0), (ute - uts).clamp(min=0)
    both = (torch.minimum(lte, ute) - torch.maximum(lts, uts)).clamp(min=0)
    both = torch.where((lower > 0) & (upper > 0), both, 0)
    return int((n - lower - upper + both).sum())


def make_layer(n: int) -> tuple[torch.Tensor, LayerKV, object, torch.Tensor, torch.Tensor]:
    """Queries, an int8 layer of random pages, its batch, and the cached numbers in bfloat16."""
    torch.manual_seed(n)
    spec = FORMATS["int8"].key
    pages = -(-n // PAGE)
    halves = []
    for _ in range(2):
        rows = torch.randn(pages, KV_HEADS, PAGE, HEAD_DIM, device="cuda")
        halves.append(QuantizedPages(spec, *quantize(rows, spec)[:2]))
    layer = LayerKV(*halves)
    table = torch.randperm(pages).tolist()
    batch = plan_batch([n], [n], [table], PAGE, "cuda")
    q = torch.randn(n, Q_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    span = torch.tensor([[0, 0, n, n, 0]], dtype=torch.int32, device="cuda")
    dense = []
    for half in halves:
        rows = torch.empty(KV_HEADS, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        gather_rows(half, batch.page_table, span, n, rows)
        dense.append(rows)
    return q, layer, batch, *dense


def check(name: str, mask: ColumnIntervals, n: int, made) -> None:
    """Both implementations against dense float32 attention, whole and for a chunk's end."""
    q, layer, batch, k, v = made
    seen = mask.materialize(torch.arange(n), n).cuda()
    params = AttendParams(HEAD_DIM**-0.5, mask)
    wanted = torch.empty(n, Q_HEADS, HEAD_DIM, device="cuda")
    for head in range(Q_HEADS):
        s = q[:, head].float() @ k[head // GROUP].float().T * HEAD_DIM**-0.5
        p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        wanted[:, head] = p @ v[head // GROUP].float()
    new = min(n, 333)
    tail = replace(
        batch,
        query_starts=torch.tensor([0, new], dtype=torch.int32, device="cuda"),
        query_lens=(new,),
    )
    for module in (gluon_flash_mask, triton_flash_mask):
        for queries, step, rows in ((q, batch, slice(None)), (q[-new:], tail, slice(n - new, n))):
            out, _ = module.attend(queries, layer, step, params)
            error = ((out.float() - wanted[rows]).norm() / wanted[rows].norm()).item()
            print(f"check {name} {module.__name__.rsplit('.')[-1]} {n}: {error:.2e}", flush=True)
            # bfloat16 outputs and dense bfloat16 inputs of the reference round to 2^-9 each.
            assert error < 8e-3, (name, module.__name__, error)


def flex(mask: ColumnIntervals, n: int, made, form: str):
    """A function that runs FlexAttention on the same mask."""
    q, _, _, k, v = made
    bounds = mask.bounds[0, 0].cuda()
    lts, last = bounds[0].clone(), bounds[-1].clone()
    lte, uts = bounds[min(1, len(bounds) - 1)].clone(), bounds[min(2, len(bounds) - 1)].clone()
    mods = {
        "causal": lambda b, h, i, j: i >= j,
        "causal1": lambda b, h, i, j: (i >= j) & (i < lts[j]),
        "causal2": lambda b, h, i, j: (i >= j) & ((i < lts[j]) | (i >= lte[j])),
        "both2": lambda b, h, i, j: (i < lts[j]) & (i >= last[j]),
        "both4": lambda b, h, i, j: (
            ((i < lts[j]) | (i >= lte[j])) & ((i < uts[j]) | (i >= last[j]))
        ),
    }
    step = plan_batch([n], [n], [list(range(-(-n // PAGE)))], PAGE, "cuda")
    plan = triton_mask_plan.plan_tiles(mask.to("cuda"), step, 1, MaskTile(128, 128))
    full, partial = plan.counts[None, None, :, 0, 0], plan.counts[None, None, :, 0, 1]
    lists = plan.tiles[:, 0].clamp(0, plan.tiles.shape[-1] - 1)
    if form == "full":
        block = None
    else:
        block = BlockMask.from_kv_blocks(
            partial.contiguous(),
            lists.flip(-1)[None, None].contiguous(),
            full.contiguous(),
            lists[None, None].contiguous(),
            BLOCK_SIZE=128,
            mask_mod=mods[form],
            seq_lengths=(n, n),
        )
    run = torch.compile(flex_attention, dynamic=False)
    q4 = q.transpose(0, 1)[None].contiguous()
    return lambda: run(q4, k[None], v[None], block_mask=block, enable_gqa=True)


def flex_form(name: str, mask: ColumnIntervals) -> str:
    """Which mask_mod a kind needs."""
    if name in ("causal", "full"):
        return name
    return ("causal" if mask.causal else "both") + str(mask.bounds.shape[2])


def time_us(function) -> float:
    """Median, L2 cleared between runs (do_bench)."""
    return do_bench(function, warmup=15, rep=60, return_mode="median") * 1e3


def measure(n: int, names: list[str], with_flex: bool, write, persistent: list[bool]) -> None:
    """Every part of every kind at one size."""
    made = make_layer(n)
    q, layer, batch, _, _ = made
    tile = MaskTile(128, 128)
    causal_pairs = n * (n + 1) // 2
    params = AttendParams(HEAD_DIM**-0.5, CausalMask())
    whole = time_us(lambda: gluon_prefill.attend(q, layer, batch, params))
    write("causal", n, "flash", "attend", whole, causal_pairs, "")
    every = kinds(n)
    step = gluon_flash_mask.mask_step(
        batch.query_lens, batch.host_context_lens, GROUP, tile, "cuda:0"
    )
    space = [torch.empty(KV_HEADS, step.rows, HEAD_DIM, device="cuda", dtype=torch.float16)
             for _ in range(2)]  # fmt: skip

    def gather():
        for half, rows in zip((layer.key, layer.value), space, strict=True):
            gather_rows(half, batch.page_table, step.spans, step.longest, rows)

    gathered = time_us(gather)
    write("all", n, "flash_mask", "gather", gathered, 0, "")
    out = torch.empty_like(q)
    lse = torch.empty(n, Q_HEADS, device="cuda")
    per_pair = None
    heads = gluon_flash_mask.heads_a_pass(KV_HEADS, step.rows * HEAD_DIM * 4)
    for name in names:
        mask = every[name]
        pairs = visible_pairs(mask, n)
        form = triton_flash_mask.lowered(mask, q.device)
        params = AttendParams(HEAD_DIM**-0.5, mask)

        def planner(form=form):
            plan = triton_mask_plan.plan_tiles(form, batch, GROUP, tile)
            return plan, triton_mask_plan.visit_order(plan)

        # In a graph: what it takes on the device, as in a step whose launches run ahead.
        planner()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan, order = planner()
        write(name, n, "flash_mask", "planner", time_us(graph.replay), pairs, "")
        for lasting in persistent:

            def kernel(lasting=lasting, planned=(step, plan, form, order), params=params):
                for head in range(0, KV_HEADS, heads):
                    rows = (space[0][head : head + heads], space[1][head : head + heads])
                    gluon_flash_mask.launch(
                        q, rows, (out, lse), params, planned, head, persistent=lasting
                    )

            us = time_us(kernel)
            if per_pair is None:
                per_pair = us / pairs
            part = "kernel" if lasting else "kernel, one program a tile"
            write(name, n, "flash_mask", part, us, pairs, f"{us / (pairs * per_pair):.3f}")
        us = time_us(lambda params=params: gluon_flash_mask.attend(q, layer, batch, params))
        write(name, n, "flash_mask", "attend", us, pairs, "")
        if with_flex:
            run = flex(mask, n, made, flex_form(name, mask))
            theirs, mine = (
                run()[0].transpose(0, 1),
                gluon_flash_mask.attend(q, layer, batch, params),
            )
            error = ((theirs.float() - mine[0].float()).norm() / mine[0].float().norm()).item()
            assert error < 1.5e-2, (name, "FlexAttention", error)
            write(name, n, "FlexAttention bf16", "attend", time_us(run), pairs, "")
            torch._dynamo.reset()


def main() -> None:
    """Flags in, CSV out."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--sizes", default="8192,32768")
    flags.add_argument("--kinds", default="")
    flags.add_argument("--out", default="")
    flags.add_argument("--commit", default="")
    flags.add_argument("--no-flex", action="store_true")
    flags.add_argument("--no-check", action="store_true")
    flags.add_argument("--only-check", action="store_true")
    flags.add_argument(
        "--only-compile", action="store_true", help="fill FlexAttention's compile cache"
    )
    flags.add_argument("--both-grids", action="store_true")
    given = flags.parse_args()
    commit = (
        given.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    rows: list[dict] = []
    facts = (torch.cuda.get_device_name(), torch.__version__, triton.__version__, commit)

    def write(kind, tokens, implementation, part, us, pairs, against):
        tflops = 4 * Q_HEADS * HEAD_DIM * pairs / us / 1e6
        values = (*facts, kind, tokens, Q_HEADS, KV_HEADS, HEAD_DIM, "int8", implementation, part,
                  f"{us:.1f}", pairs, f"{tflops:.1f}", against)  # fmt: skip
        if implementation.startswith("Flex"):
            values = (*values[:9], "bf16", *values[10:])
        rows.append(dict(zip(FIELDS, values, strict=True)))
        print(
            kind, tokens, implementation, part, f"{us:.1f} us {tflops:.1f} TF {against}", flush=True
        )
        if given.out:
            with Path(given.out).open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)

    # Every kind is a closure of its own, which Dynamo counts as a recompilation.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    if given.only_compile:
        for size in map(int, given.sizes.split(",")):
            made, every = make_layer(size), kinds(size)
            for name in given.kinds.split(","):
                flex(every[name], size, made, flex_form(name, every[name]))()
        return
    if not given.no_check:
        made = make_layer(1800)
        for name, mask in kinds(1800).items():
            check(name, mask, 1800, made)
    if given.only_check:
        return
    for size in map(int, given.sizes.split(",")):
        names = given.kinds.split(",") if given.kinds else list(kinds(size))
        if size > LONG and not given.kinds:
            names = ["causal", "causal_document", "sliding_window"]
        measure(
            size, names, not given.no_flex, write, [True, False] if given.both_grids else [True]
        )


if __name__ == "__main__":
    main()
