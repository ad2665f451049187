"""Decode and prompts over latent rows (MLA) in DeepSeek-V3's shapes, beside copying and
multiplying alone.
"""

from collections.abc import Iterator
from dataclasses import replace

from quantpage.bench import decode
from quantpage.bench.cases import Case, random_pages
from quantpage.bench.rows import Row
from quantpage.cache.views import LayerKV
from quantpage.formats import FORMATS

RANK, ROTARY = 512, 64
FORMATS_TIMED = ("none", "int8", "fp8")


def _case(requests: int, context: int, new: int, heads: int) -> Case:
    tokens = f", {new} tokens" if new > 1 else ""
    return Case(
        requests, context, FORMATS_TIMED, new=new, q_heads=heads, kv_heads=1, head_dim=RANK,
        title=f"{requests} x {context // 1024}k, {heads} heads{tokens}",
    )  # fmt: skip


_STEPS = (
    *((64, 4096, 1), (16, 32768, 1), (1, 32768, 1), (8, 8192, 1), (64, 4096, 4)),
    # A prompt, and a chunk at the end of one.
    *((1, 4096, 4096), (1, 32768, 512)),
)
CASES = tuple(_case(*step, heads) for heads in (128, 16) for step in _STEPS)


def measure(case: Case, name: str, copy: float, timed: bool) -> Iterator[Row]:
    """Ours for one format: a row, or nothing where only checked."""
    for row in decode.measure(case, name, copy, timed, "latent", latent_layer):
        speed = operations(case) / row.microseconds / 1e6
        print(f"{case.name} {name}: {speed:.0f} TFLOP/s", flush=True)
        yield row


def operations(case: Case) -> float:
    """Of the products of a step: every head with every row that it sees, twice, and its rotary
    channels.
    """
    hidden = case.new * (case.new - 1) / 2
    pairs = case.requests * (case.new * case.context - hidden)
    return 2 * case.q_heads * (2 * RANK + ROTARY) * pairs


def latent_layer(case: Case, name: str) -> LayerKV:
    """One layer's random rows and rotary channels."""
    given, pages = FORMATS[name], case.requests * -(-case.context // case.page_size)
    rows, rotary = (
        random_pages(spec, pages, replace(case, head_dim=width), "cuda")
        for spec, width in ((given.key, RANK), (given.value, ROTARY))
    )
    return LayerKV(rows, rotary, latent=True)
