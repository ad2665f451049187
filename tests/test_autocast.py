"""Ops give the same inside a caller's autocast, which rounds the operands of torch's products."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cpu_core import find_core
from quantpage.formats import rotate
from quantpage.formats.key_map import KeyMap
from quantpage.formats.table import find_format
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.gather import gather
from quantpage.ops.rope_write import WriteParams, rope_write

pytestmark = pytest.mark.cpu

CORE = find_core()
PAGE, TOKENS, HEADS, DIM = 16, 40, 2, 32


def answers(name, kv_format, on):
    """Outputs, log-sum-exps, and what the pages hold, after one prompt under a key map."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(TOKENS, 2 * HEADS, DIM), torch.randn(2, TOKENS, HEADS, DIM)
    scale, mean = torch.rand(HEADS, DIM) + 0.5, torch.randn(HEADS, DIM)
    turn = torch.eye(DIM) + 0.1 * torch.randn(HEADS, DIM, DIM)
    key_map = None if kv_format == "none" else KeyMap(scale, mean, turn=turn)
    pages = list(range(-(-TOKENS // PAGE)))
    cache = PagedKVCache(pages=len(pages), exact_pages=len(pages))
    layout = CacheLayout(HEADS, DIM, find_format(kv_format), PAGE, torch.float32)
    cache.add_layer(0, layout, key_map=key_map)
    layer = cache.layer(0)
    exact = None if layer.exact_key is None else [pages]
    batch = plan_batch([TOKENS], [TOKENS], [pages], PAGE, exact_tables=exact)
    params = AttendParams(DIM**-0.5, CausalMask(), sinks=torch.zeros(2 * HEADS))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        written = rope_write(q, k, v, layer, batch, WriteParams(), name)
        out, lse = attend(written.q, layer, batch, params, name, model_basis=True)
        held = rotate(gather(layer.key, batch.page_table[0], TOKENS, torch.float32))
        back = held if key_map is None else key_map.restored(held)
    return out, lse, held, back


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_ops_give_the_same_inside_autocast(name, kv_format):
    if name == "cpu" and CORE is None:
        pytest.skip("the compiled core is not built")
    for plain, inside in zip(
        answers(name, kv_format, False), answers(name, kv_format, True), strict=True
    ):
        assert torch.equal(plain, inside)
