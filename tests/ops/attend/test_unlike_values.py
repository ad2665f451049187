"""Value rows that are unlike each other: none may cost the others what they have to say.

Implementations that round weights against the largest of a tile (the compiled core: 15 bits of
probability times scale) are wrong here if the largest belongs to a row that adds nothing.
"""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec, rotate
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, causal_document
from quantpage.ops.attend import CANDIDATES, AttendParams, attend
from quantpage.ops.dispatch import Call
from tests.ops.cpu_cases import make_pages
from tests.tolerances import assert_agrees

pytestmark = pytest.mark.cpu
IMPLEMENTATIONS = [each for each in CANDIDATES if each.name not in ("triton", "gluon")]
ZERO8 = QuantSpec(CODES["int8"], zero_point=True)
PLAIN4 = QuantSpec(CODES["int4"], scale_dtype=torch.float32)
GROUPS = QuantSpec(CODES["int8"], Granularity(group=16))
MADE = {each: FORMATS[each] for each in ("int8", "int4", "k8v4", "fp8", "none")}
MADE |= {name: FORMATS[name] for name in ("int8_static", "int4_static", "fp8_static")}
MADE |= {
    name: KVFormat(name, spec, spec)
    for name, spec in (("zero8", ZERO8), ("plain4", PLAIN4), ("groups", GROUPS))
}
CONTEXT, PAGE, DIM = 200, 16, 64


def zeros(v, at):
    v[at] = 0.0


def tiny(v, at):
    v[at] *= 1e-6


def constant(v, at):
    v[at] = 1e-4


def huge(v, at):
    v[at] *= 1e4


ROWS = {"zeros": zeros, "tiny": tiny, "constant": constant, "huge": huge}


def layer_of(kv_format, k, v):
    """Pages in the basis of the cache, of one kv_head."""
    turn = {"hadamard": rotate, "none": lambda x: x}
    halves = []
    for spec, x in ((kv_format.key, k), (kv_format.value, v)):
        pages = turn[spec.rotation](x).reshape(-1, PAGE, DIM)[:, None]
        halves.append(make_pages(spec, pages, torch.float32))
    return LayerKV(*halves)


def case(kv_format, change, at, size, new=1, heads=3):
    """Keys ``at`` draw the queries hard, and have the changed values."""
    kv_format = replace(kv_format, exact_pages=None)
    k, v = torch.randn(208, DIM), torch.randn(208, DIM) * size
    q = torch.randn(new, heads, DIM)
    change(v, at)
    strength = -60.0 if change is huge else 48.0
    k[at] = strength * torch.nn.functional.normalize(q[-1, 0], dim=0)
    layer = layer_of(kv_format, k, v)
    if kv_format.key.rotation == "hadamard":
        q = rotate(q)
    tables = [list(range(CONTEXT // PAGE + 1))]
    return q, layer, plan_batch([new], [CONTEXT], tables, PAGE)


def run(implementation, kv_format, q, layer, batch, mask):
    call = Call(device_info("cpu"), kv_format, torch.float32, q.shape[1], 1, DIM, DIM, PAGE)
    reasons = implementation.refusals(replace(call, mask=mask.kind))
    if reasons:
        pytest.skip(" ".join(reasons))
    params = AttendParams(DIM**-0.5, mask)
    assert_agrees(
        attend(q, layer, batch, params, implementation), q, layer, batch, params, torch.bfloat16
    )


@pytest.fixture(params=IMPLEMENTATIONS, ids=[each.name for each in IMPLEMENTATIONS])
def implementation(request):
    return request.param


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("at", [[0], [3, 90, 150], list(range(64))], ids=["one", "three", "many"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MADE)
def test_one_row_does_not_cost_the_others(implementation, name, rows, at, size):
    if not MADE[name].dynamic and (rows == "huge" or size < 1):
        pytest.skip("given scales do not follow the numbers")
    if MADE[name].value.code.name == "none" and rows == "huge":
        pytest.skip("no scale to be unlike")
    q, layer, batch = case(MADE[name], ROWS[rows], at, size)
    run(implementation, MADE[name], q, layer, batch, CausalMask())


@pytest.mark.parametrize("new", [3, 40])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["int8", "int4", "zero8", "int8_static"])
def test_rows_that_some_queries_do_not_see(implementation, name, rows, new):
    """The changed row stands among the step's own tokens, or in a document of its own."""
    if name == "int8_static" and rows == "huge":
        pytest.skip("given scales do not follow the numbers")
    for mask in (CausalMask(), causal_document([190, 10])):
        q, layer, batch = case(MADE[name], ROWS[rows], [188, 198], 0.1, new)
        run(implementation, MADE[name], q, layer, batch, mask)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", ["int8", "plain4", "zero8", "int4"])
def test_pages_of_zeros_with_scale_one(implementation, name, size):
    """As files of version 0.1 hold them."""
    for at in ([0], [3, 90, 150], list(range(64))):
        q, layer, batch = case(MADE[name], zeros, at, size)
        value = layer.value
        for key in at:
            value.scale[key // PAGE, :, key % PAGE] = 1.0
            value.codes[key // PAGE, :, key % PAGE] = 0x88 if value.spec.code.bits == 4 else 0
            if value.zero is not None:
                value.zero[key // PAGE, :, key % PAGE] = 0.0
        run(implementation, MADE[name], q, layer, batch, CausalMask())


@pytest.mark.parametrize("faint", [0, 1, 3])
@pytest.mark.parametrize("name", ["int8", "int8_static", "int4_static"])
def test_rows_of_faint_codes(implementation, name, faint):
    """A row that draws all attention and says next to nothing, by its codes or by its zero."""
    q, layer, batch = case(MADE[name], zeros, [5], 1.0)
    codes = layer.value.codes[0, 0, 5]
    if name == "int4_static":
        spec = layer.value.spec
        zero, scale = layer.value.zero[0], layer.value.scale[0]
        wanted = (-zero / scale).round().clamp(-8, 7).to(torch.int8)
        wanted[:faint] += 1
        from quantpage.formats.quantize import pack_nibbles

        assert spec.zero_point
        codes[:] = pack_nibbles(wanted.clamp(-8, 7))
    else:
        codes[:] = torch.randint(-1, 2, (DIM,), dtype=torch.int8) * faint
    run(implementation, MADE[name], q, layer, batch, CausalMask())
