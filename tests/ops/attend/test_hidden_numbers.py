"""NaN and infinity: the mask decides who is touched, in every implementation."""

from itertools import product

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.formats import FORMATS
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask, causal_document
from quantpage.ops import rope_write
from quantpage.ops.attend import CANDIDATES, AttendParams, attend, reference
from quantpage.ops.dispatch import Call
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu
BAD = (torch.nan, torch.inf, -torch.inf)
AT, CONTEXT = 45, 60
MASKS = (CausalMask(), CausalMask(window=9), causal_document([46, 14]), FullMask())


def ours(candidates):
    return [e for e in candidates if e.name not in ("triton", "gluon")]


def run_reference(q, layer, batch, params, _):
    return reference.attend(q, layer, batch, params)


IMPLEMENTATIONS = {each.name: (each, attend) for each in ours(CANDIDATES)}
IMPLEMENTATIONS["reference"] = (None, run_reference)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def case(name, q_heads):
    return cached(name, [CONTEXT], q_heads=q_heads, dtype=torch.float32)


def run(implementation, name, made, first, mask, softcap=None):
    chosen, function = IMPLEMENTATIONS[implementation]
    if chosen is not None:
        heads = (made.q[0].shape[1], 2, 32, 32)
        call = Call(device_info("cpu"), FORMATS[name], torch.float32, *heads, 16, mask=mask.kind)
        reasons = chosen.refusals(call)
        if reasons:
            pytest.skip(" ".join(reasons))
    q, batch = made.step([(first, CONTEXT)])
    return function(q, made.layer, batch, AttendParams(32**-0.5, mask, softcap), chosen)


@pytest.mark.parametrize("mask", MASKS, ids=["causal", "window", "document", "full"])
@pytest.mark.parametrize("first", [59, 57, 44, 0])
@pytest.mark.parametrize("q_heads", [2, 8])
@pytest.mark.parametrize("name", ["none", "int4", "int8_exact"])
def test_only_who_sees_it_is_touched(implementation, name, q_heads, first, mask):
    made = case(name, q_heads)
    clean, clean_lse = run(implementation, name, made, first, mask)
    pages = made.layer.exact() if FORMATS[name].exact_pages else made.layer
    positions = torch.arange(first, CONTEXT)
    sees = mask.visible(positions, torch.tensor([AT]))[:, 0]
    if FORMATS[name].exact_pages:
        # Through its codes, which are clean, where it is not near.
        behind = positions // 16 - AT // 16
        sees &= (behind >= 0) & (behind <= 1)
    touched = torch.zeros_like(clean_lse, dtype=torch.bool)
    touched[sees, : q_heads // 2] = True
    place = made.tables[0][AT // 16], 0, AT % 16, 3
    for side, bad in product(("key", "value"), BAD):
        plane = pages.key.codes if side == "key" else pages.value.codes
        before = plane[place].clone()
        plane[place] = bad
        out, lse = run(implementation, name, made, first, mask)
        plane[place] = before
        assert torch.equal(out[~touched], clean[~touched]), (side, bad)
        assert torch.equal(lse[~touched], clean_lse[~touched]), (side, bad)
        if side == "value":
            assert not out[touched][:, 3].isfinite().any(), bad
        elif bad != bad:
            assert out[touched].isnan().all() and lse[touched].isnan().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("first", [59, 57, 0])
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "int8_static"])
def test_a_query_that_is_not_finite_stays_so_alone(implementation, name, first, softcap, bad):
    made = case(name, 4)
    clean, _ = run(implementation, name, made, first, CausalMask(), softcap)
    made.q[0][58, 1, 5] = bad
    made.q[0][59, 2, 5] = bad
    out, lse = run(implementation, name, made, first, CausalMask(), softcap)
    touched = torch.zeros_like(lse, dtype=torch.bool)
    touched[59 - first, 2] = True
    if first < 59:
        touched[58 - first, 1] = True
    assert out[touched].isnan().all() and lse[touched].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "k8v4"])
@pytest.mark.parametrize(
    "writer", ours(rope_write.CANDIDATES), ids=[e.name for e in ours(rope_write.CANDIDATES)]
)
def test_exact_pages_are_written_finite(writer, name, dtype):
    layout = CacheLayout(2, 64, FORMATS[name], 16, dtype)
    reasons = writer.refusals(Call(device_info("cpu"), FORMATS[name], dtype, 4, 2, 64, 64, 16))
    if reasons:
        pytest.skip(" ".join(reasons))
    cache = PagedKVCache(2, 2)
    cache.add_layer(0, layout)
    k, v = torch.randn(5, 2, 64, dtype=dtype), torch.randn(5, 2, 64, dtype=dtype)
    batch = plan_batch([5], [5], [[1]], 16, exact_tables=[[1]])
    layer, params = cache.layer(0), rope_write.WriteParams()
    writer.load()(None, k, v, layer, batch, params)
    clean = layer.exact_value[1, :, :5].clone()
    for token, bad in enumerate(BAD):
        k[token, 0, 3] = v[token, 1, 7] = bad
    writer.load()(None, k, v, layer, batch, params)
    for plane in (layer.exact_key, layer.exact_value):
        assert plane[1].isfinite().all()
    assert torch.equal(layer.exact_value[1, 0, :5], clean[0])
    assert torch.equal(layer.exact_value[1, 1, 3:5], clean[1, 3:])
    assert layer.exact_value[1, 1, 0].eq(0).all(), "a NaN makes its whole rotated row 0"


def test_two_passes_select_too(implementation):
    """A step of exact pages whose bodies hold garbage where they are near."""
    made = case("int4", 4)
    clean, _ = run(implementation, "int4", made, 50, CausalMask())
    for half in (made.layer.key, made.layer.value):
        for page in (made.tables[0][0], made.tables[0][2], made.tables[0][3]):
            for plane in (half.scale, half.zero):
                plane[page] = torch.nan
    out, _ = run(implementation, "int4", made, 50, CausalMask())
    assert torch.equal(out, clean)
