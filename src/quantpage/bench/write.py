"""The fused write beside the copy bandwidth, and beside a plain engine's separate steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, plan_batch
from quantpage.bench.cases import Case, cache_bytes, make_layer, near_pages
from quantpage.bench.rows import Row, row_of
from quantpage.bench.timing import COLD_BYTES, graph_microseconds
from quantpage.cache.views import LayerKV
from quantpage.formats import KeyMap, KVFormat, find_format
from quantpage.formats.feedback import with_feedback
from quantpage.hardware import device_info
from quantpage.ops import rope_write as write_op
from quantpage.ops.dispatch import Call, choose
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rope_write.reference import rope_write as reference
from quantpage.rope import RopeTable, rope_table

TOKENS = (64, 4096, 16384)
IN_TURN = " in turn"
"""Behind a format's name: its keys have a map with feedback."""
FORMATS_TIMED = (
    "none", "int8", "int8" + IN_TURN, "fp8", "int6", "int4", "int4" + IN_TURN, "k8v4", "int3",
    "int8_static",
)  # fmt: skip
CODES_OFF, IN_TURN_OFF = 1e-3, 1e-2
"""Share of codes that may differ from the reference: numbers a rounding away from a tie, and where
keys are rounded in turn those that such a number takes along."""


def measure(tokens: int, name: str, copy: float, timed: bool) -> Iterator[Row]:
    """One launch from a fused QKV projection into random pages."""
    case = Case(1, tokens, (name,))
    plainly, in_turn = name.removesuffix(IN_TURN), name.endswith(IN_TURN)
    given = find_format(plainly)
    layer, batch = prompt_step(case, plainly)
    if in_turn:
        layer = replace(layer, key_map=_random_map(case, given.key.rotation == "hadamard"))
    heads = (case.q_heads, case.kv_heads, case.kv_heads)
    width = sum(heads) * case.head_dim
    count = max(2, min(16, -(-COLD_BYTES // (tokens * width * 2)))) if timed else 1
    fused = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    steps = [t.unflatten(1, (-1, case.head_dim)).split(heads, 1) for t in fused]
    table = rope_table(tokens, case.head_dim, device="cuda")
    params = WriteParams(table)
    call = Call(
        device_info("cuda"), given, torch.bfloat16, *heads[:2], case.head_dim, case.head_dim,
        case.page_size, in_turn=in_turn,
    )  # fmt: skip
    chosen = choose(write_op.CANDIDATES, call)
    write = chosen.load()
    error = _error(write, steps[0], layer, batch, params)
    most = IN_TURN_OFF if in_turn else CODES_OFF
    if not error <= most:
        raise ValueError(
            f"write {tokens} {name}: expected at most {most} of the codes to differ from the "
            f"reference, got {error:.1e}"
        )
    if not timed:
        return
    moved = _moved_bytes(case, given, layer)
    named = replace(case, new=tokens)

    def row(who: str, name: str, run: Callable, error: float) -> Row:
        def all_steps() -> None:
            for step in steps:
                run(*step)

        figures = graph_microseconds(all_steps, count), moved, copy, error
        return row_of("write", named, name, (f"{tokens} tokens", who), figures)

    ours = partial(write, layer=layer, batch=batch, params=params)
    yield row(f"quantpage {chosen.name}", name, ours, error)
    if name == "none":
        plain = _plain(layer, batch.slots, batch.positions, table)
        yield row("torch, a kernel a step", "bf16 pages", plain, 0.0)


def _error(
    write: Callable,
    qkv: Sequence[Tensor],
    layer: LayerKV,
    batch: BatchPlan,
    params: WriteParams,
) -> float:
    """Share of the codes that are not the reference's; queries have to agree."""
    other = replace(
        layer,
        key=replace(layer.key, codes=layer.key.codes.clone()),
        value=replace(layer.value, codes=layer.value.codes.clone()),
    )
    q, k, v = qkv
    got = write(q, k, v, layer, batch, params)
    wanted = reference(q, k, v, other, batch, params)
    torch.testing.assert_close(got.q, wanted.q, rtol=2e-2, atol=2e-2)
    return _codes_that_differ(layer, other)


def _moved_bytes(case: Case, given: KVFormat, layer: LayerKV) -> int:
    """Bytes that a write of ``case.context`` tokens has to read and write."""
    tokens, head = case.context, case.head_dim
    rows = cache_bytes(layer) // (layer.key.pages * case.page_size) * tokens
    if not given.dynamic:
        rows = tokens * case.kv_heads * head * 2
    if layer.exact_key is not None:
        rows += tokens * case.kv_heads * head * 4
    projected = tokens * (case.q_heads + 2 * case.kv_heads) * head * 2
    return projected + tokens * case.q_heads * head * 2 + rows


def prompt_step(case: Case, name: str, device: str = "cuda") -> tuple[LayerKV, BatchPlan]:
    """An empty request's prompt of ``case.context`` tokens, which fills a layer in random pages."""
    layer = make_layer(case, name, device)
    pages, exact = layer.key.pages, None
    if layer.exact_key is not None:
        # While a prompt is written all of its pages are exact.
        near = near_pages(find_format(name), pages, case, device)
        layer = replace(layer, exact_key=near[0], exact_value=near[1])
        exact = [list(range(pages))]
    table = torch.randperm(pages).tolist()
    tokens = (case.context,)
    return layer, plan_batch(tokens, tokens, [table], case.page_size, device, exact)


def _random_map(case: Case, rotated: bool) -> KeyMap:
    """A map of one layer by a metric of a few directions, as queries have them."""
    shape = (case.kv_heads, case.head_dim)
    metric = torch.randn(*shape, 32, device="cuda")
    metric = metric @ metric.mT + torch.eye(case.head_dim, device="cuda")
    scale, mean = torch.rand(shape, device="cuda") + 0.5, torch.randn(shape, device="cuda")
    return with_feedback(KeyMap(scale, mean), metric, rotated)


def _codes_that_differ(one: LayerKV, two: LayerKV) -> float:
    if not one.key.spec.quantized:
        close = torch.isclose(one.key.codes, two.key.codes, rtol=2e-2, atol=2e-2)
        return 1.0 - close.float().mean().item()
    first, second = (half.key.codes.view(torch.uint8) for half in (one, two))
    return (first != second).float().mean().item()


def _plain(layer: LayerKV, slots: Tensor, positions: Tensor, table: RopeTable) -> Callable:
    """Rotate, then scatter, in bfloat16: what an engine does that fuses neither."""
    cos, sin = (t[positions].bfloat16()[:, None] for t in (table.cos, table.sin))
    size = layer.page_size

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.key.codes[slots // size, :, slots % size] = turned(k)
        layer.value.codes[slots // size, :, slots % size] = v
        return turned(q)

    return run
