"""The exact-page rule in torch, Triton, Gluon and C++: each reads exactly what exact_pairs says."""

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import DEVICE, HOPPER, TIER

# isort: split
import triton
import triton.language as tl

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.cpu_core import find_core
from quantpage.formats import find_format
from quantpage.masks import CausalMask, FullMask, document
from quantpage.ops.attend import CANDIDATES, AttendParams, attend
from quantpage.ops.attend.flash.triton_segments import exact_pairs as pairs_in_triton
from quantpage.ops.attend.flash.triton_segments import near_page, near_queries
from quantpage.ops.attend.params import exact_band, exact_pairs

pytestmark = TIER
PAGE, CONTEXT, WIDTH = 16, 101, 128  # a channel a key
BY_TARGET = {each.target.removeprefix("quantpage.ops.attend."): each for each in CANDIDATES}


@triton.jit
def _rule_kernel(exact, near, first, end, page_size, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    queries, keys = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    at = queries[:, None] * KEYS + keys[None, :]
    tl.store(exact + at, pairs_in_triton(queries[:, None], keys[None, :], page_size).to(tl.int8))
    tl.store(near + queries, near_page(queries, page_size))
    from_query, to_query = near_queries(keys, page_size)
    tl.store(first + keys, from_query)
    tl.store(end + keys, to_query)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_triton_says_what_torch_says(page_size):
    queries, keys = torch.arange(128), torch.arange(256)
    exact = torch.empty(128, 256, dtype=torch.int8, device=DEVICE)
    near = torch.empty(128, dtype=torch.int32, device=DEVICE)
    first, end = (torch.empty(256, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _rule_kernel[(1,)](exact, near, first, end, page_size, QUERIES=128, KEYS=256)
    wanted = exact_pairs(queries, keys, page_size)
    assert torch.equal(exact.bool().cpu(), wanted)
    bands = [exact_band(query, query, page_size) for query in queries.tolist()]
    assert (near.clamp_min(0) * page_size).tolist() == [low for low, _ in bands]
    # Beyond the first page, whose keys are exact for everybody.
    between = (queries[:, None] >= first.cpu()) & (queries[:, None] < end.cpu())
    assert torch.equal(between[:, page_size:], wanted[:, page_size:])


def one_hot_layer() -> LayerKV:
    """Scores are all alike; an exact value is 1 in its key's channel, codes are 0."""
    form, pages = find_format("int8_exact"), -(-CONTEXT // PAGE)
    codes = torch.zeros(pages, 1, PAGE, WIDTH, dtype=torch.int8)
    scale = torch.ones(pages, 1, PAGE, 1, dtype=torch.float16)
    halves = [QuantizedPages(spec, codes.clone(), scale.clone()) for spec in (form.key, form.value)]
    values = torch.eye(WIDTH)[: pages * PAGE].view(pages, 1, PAGE, WIDTH)
    exact = [torch.zeros(values.shape, dtype=torch.float16), values.to(torch.float16)]
    return LayerKV(*halves, *exact)


MASKS = {
    "causal": CausalMask(),
    "full": FullMask(),
    "interval": document([CONTEXT]),
}
CASES = [
    (target, kind, new)
    for target, kinds, lengths in (
        ("torch_blockwise:attend", ("causal", "full", "interval"), (1, CONTEXT)),
        ("cpu:attend", ("causal", "full", "interval"), (1, CONTEXT)),
        ("decode.triton:attend", ("causal", "full"), (1, 3, 16)),
        ("prefill.triton:attend", ("causal", "full"), (37, CONTEXT)),
        ("prefill.gluon:attend", ("causal", "full"), (37, CONTEXT)),
        ("interval.triton:attend", ("interval",), (1, CONTEXT)),
        ("interval.gluon:attend", ("interval",), (CONTEXT,)),
    )
    for kind in kinds
    for new in lengths
]


@pytest.mark.parametrize(("target", "kind", "new"), CASES)
def test_every_implementation_reads_what_the_rule_says(target, kind, new):
    if "gluon" in target and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    if target.startswith("cpu") and find_core() is None:
        pytest.skip("needs the compiled core")
    device = "cpu" if target.startswith(("cpu", "torch")) else DEVICE
    layer = one_hot_layer()
    halves = (
        QuantizedPages(half.spec, half.codes.to(device), half.scale.to(device))
        for half in (layer.key, layer.value)
    )
    layer = LayerKV(*halves, layer.exact_key.to(device), layer.exact_value.to(device))
    table = list(range(layer.key.pages))
    batch = plan_batch([new], [CONTEXT], [table], PAGE, device, [table])
    mask = MASKS[kind]
    q = torch.ones(new, 8, WIDTH, dtype=torch.float16, device=device)
    out, _ = attend(q, layer, batch, AttendParams(WIDTH**-0.5, mask), BY_TARGET[target])
    queries, keys = torch.arange(CONTEXT - new, CONTEXT), torch.arange(CONTEXT)
    seen = mask.materialize(queries, CONTEXT, 0)
    read = out[:, 0, :CONTEXT].float().cpu() * seen.sum(1, keepdim=True)
    wanted = (seen & exact_pairs(queries, keys, PAGE)).float()
    assert torch.allclose(read, wanted, atol=0.01)
