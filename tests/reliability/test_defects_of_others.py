"""Defects that other systems shipped, as tests that this one passes (docs/reliability.md).

Each is named after what it protects from and runs over every implementation that this machine has:
plain torch, the compiled core, and the Triton kernels on a GPU or in Triton's interpreter.
"""

import numpy as np
import pytest
import torch

from quantpage import masks
from quantpage.attention import build_attention, find_backend
from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, LayerKV, PagedKVCache, PrefixCache, QuantizedPages
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec, rotate
from quantpage.hardware import DeviceInfo, device_info
from quantpage.ops import gather as gather_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.reference import attend as oracle
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams
from tests.one_layer import PAGE as ENGINE_PAGE
from tests.one_layer import Engine, close
from tests.ops.triton_cases import DEVICE, GPU, TIER, relative

PAGE, WIDTH, HEADS, KV = 16, 64, 4, 2
W, A = WriteParams(), AttendParams(WIDTH**-0.5)
IMPLEMENTATIONS = [
    pytest.param("torch", marks=pytest.mark.cpu),
    pytest.param("cpu", marks=pytest.mark.cpu),
    pytest.param("triton", marks=TIER),
]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def where(implementation: str) -> str:
    return DEVICE if implementation == "triton" else "cpu"


def attention(implementation, form: KVFormat, dtype=torch.float16, mask=None, page=PAGE):
    device = device_info(where(implementation))
    if implementation == "triton" and not GPU:
        device = DeviceInfo("cuda", "Triton's interpreter", (8, 0), 4)
    call = Call(device, form, dtype, HEADS, KV, WIDTH, WIDTH, page)
    mask = mask or masks.CausalMask()
    backend = find_backend("flash_mask" if mask.kind == "interval" else "flash")
    return build_attention(backend, mask, call, implementation)


def rows(tokens: int, dtype=torch.float16, device="cpu"):
    return [torch.randn(tokens, heads, WIDTH).to(dtype).to(device) for heads in (HEADS, KV, KV)]


def cache_of(form, implementation, pages=8, dtype=torch.float16, static=None) -> PagedKVCache:
    cache = PagedKVCache(pages, pages, device=where(implementation))
    cache.add_layer(0, CacheLayout(KV, WIDTH, form, PAGE, dtype), static)
    return cache


def in_chunks(serving, layer, numbers, cuts, tables, exact=None, params=A):
    """One request's tokens in steps that end at ``cuts``; outputs one after the other."""
    outs, start = [], 0
    device = layer.device
    for end in cuts:
        batch = plan_batch([end - start], [end], [tables], layer.page_size, device, exact)
        outs.append(serving(*(x[start:end] for x in numbers), layer, batch, W, params).out)
        start = end
    return torch.cat(outs)


def planes(layer: LayerKV) -> list[torch.Tensor]:
    halves = [p for h in (layer.key, layer.value) for p in (h.codes, h.scale, h.zero)]
    return [p for p in (*halves, layer.exact_key, layer.exact_value) if p is not None]


@every_implementation
def test_a_layer_touches_no_other_layer(implementation):
    """FastDeploy D2: caches in one list, found by 2 * layer or 4 * layer, which was mixed up."""
    cache = PagedKVCache(8, 8, device=where(implementation))
    names = ["none", "int8", "int4", "fp8"]
    for index, name in enumerate(names):
        cache.add_layer(index, CacheLayout(KV, WIDTH, FORMATS[name], PAGE, torch.float16))
    numbers = rows(20, device=where(implementation))
    for index, name in enumerate(names):
        before = [[p.clone() for p in planes(cache.layer(each))] for each in range(len(names))]
        serving = attention(implementation, FORMATS[name])
        in_chunks(serving, cache.layer(index), numbers, (20,), [5, 2], [[1, 3]])
        for other in range(len(names)):
            same = [
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(before[other], planes(cache.layer(other)), strict=True)
            ]
            assert all(same) == (other != index)


@every_implementation
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_a_scale_a_channel_is_read_a_channel(implementation, code):
    """FastDeploy D3: prefill read scale[kv_head] of an array with a scale a channel."""
    spec = QuantSpec(CODES[code], Granularity(1), dynamic=False)
    form = KVFormat("a scale a channel", spec, spec)
    q, k, v = rows(50, device=where(implementation))
    # Channels whose sizes differ by three orders: another channel's scale is far off.
    size = torch.logspace(-2, 1, WIDTH).half().to(k.device)
    k, v = k * size, v * size.flip(0)
    scales = [x.abs().amax(0).float() / spec.code.qmax for x in (k, v)]
    cache = cache_of(form, implementation, static=tuple((s, None) for s in scales))
    serving, table = attention(implementation, form), [3, 1, 6, 2]
    out = in_chunks(serving, cache.layer(0), (q, k, v), (30, 49, 50), table)
    wanted = dense(q, k, v)
    assert relative(out, wanted) < (0.08 if code == "fp8" else 0.03)


def dense(q, k, v):
    """Causal attention in float64, by its definition."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * WIDTH**-0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@every_implementation
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "k8v4", "none"])
def test_a_slot_is_written_over_and_not_merged(implementation, name):
    """FastDeploy D7: new codes were or-ed into a partly filled page, a rejected draft's too."""
    form = FORMATS[name]
    serving = attention(implementation, form)
    numbers = rows(21, device=where(implementation))
    clean, used = (cache_of(form, implementation).layer(0) for _ in range(2))
    for plane in planes(used):
        plane.view(torch.uint8).fill_(0xFF)
    draft = [torch.randn_like(x) * 9 for x in numbers]
    in_chunks(serving, used, draft, (21,), [1, 2], [[1, 2]])
    for layer in (clean, used):
        in_chunks(serving, layer, numbers, (18, 21), [1, 2], [[1, 2]])
    for a, b in zip(planes(clean), planes(used), strict=True):
        a, b = (x[1:3].view(torch.uint8).cpu() for x in (a, b))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, :, :5], b[1, :, :5])


@every_implementation
def test_a_zero_keeps_its_fraction(implementation):
    """FastDeploy D13: read back as bfloat16(zero + 136), which has no fraction."""
    spec = QuantSpec(CODES["int4"], Granularity(1), dynamic=False, zero_point=True)
    codes = torch.arange(PAGE * WIDTH // 2).view(1, 1, PAGE, WIDTH // 2).remainder(256).byte()
    codes = codes.repeat(1, KV, 1, 1).to(where(implementation))
    zero = torch.linspace(-2.6, 1.49, KV * WIDTH).view(KV, WIDTH).to(codes.device)
    scale = torch.full_like(zero, 0.25)
    pages = QuantizedPages(spec, codes, scale, zero)
    gather = {each.name: each for each in gather_op.CANDIDATES}[implementation].load()
    table = torch.zeros(1, dtype=torch.int32, device=codes.device)
    got = gather(pages, table, PAGE, torch.float32).cpu()
    packed = codes.cpu().numpy()
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(KV, PAGE, WIDTH)
    wanted = 0.25 * (nibbles.astype(np.float64) - 8) + zero.cpu().double().numpy()[:, None]
    np.testing.assert_allclose(got.transpose(0, 1).numpy(), wanted, rtol=0, atol=2e-6)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_every_code_serves_both_sixteen_bit_dtypes(implementation, name, dtype):
    """FastDeploy D14: fp8 codes under a float16 model printed a line and left registers unset."""
    if implementation == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter has no bfloat16 products that are right")
    numbers = rows(40, dtype, where(implementation))
    layer = cache_of(FORMATS[name], implementation, dtype=dtype).layer(0)
    serving = attention(implementation, FORMATS[name], dtype)
    out = in_chunks(serving, layer, numbers, (39, 40), [4, 0, 7], [[3, 1, 2]])
    assert out.dtype == dtype
    # What 4 bits cost is the most; garbage is off by its whole size.
    assert relative(out, dense(*numbers)) < {"fp8": 0.06, "int8": 0.02, "int4": 0.12}[name]


FAR = 2**30 + 2**12
"""Bytes from a page to the next: the third begins past 2^31."""


def far_apart(layer: LayerKV) -> LayerKV:
    """The same pages in memory that is only there where they lie (zeros that nobody touched)."""
    device = layer.device

    def far(plane):
        size = plane.itemsize
        if device.type == "cpu":
            room = torch.from_numpy(np.zeros(3 * FAR, np.uint8)).view(plane.dtype)
        else:
            room = torch.empty(3 * FAR // size, dtype=plane.dtype, device=device)
        made = room.as_strided(plane.shape, (FAR // size, *plane.stride()[1:]))
        made.view(torch.uint8).copy_(plane.view(torch.uint8))
        return made

    def half(pages):
        return QuantizedPages(pages.spec, far(pages.codes), far(pages.scale))

    return LayerKV(half(layer.key), half(layer.value))


@every_implementation
@pytest.mark.parametrize("mask", [masks.CausalMask(), masks.causal_document([40])])
def test_offsets_beyond_two_to_the_31(implementation, mask):
    """FastDeploy D19: offsets of 32 bits, which a large cache wraps around."""
    form = FORMATS["int8"]
    numbers = rows(40, device=where(implementation))
    near = cache_of(form, implementation, pages=3).layer(0)
    far = far_apart(near)
    serving = attention(implementation, form, mask=mask)
    params = AttendParams(WIDTH**-0.5, mask)
    # A prompt longer than decode's 16 tokens, and a decode step, whose newest page is the far one.
    outs = [
        in_chunks(serving, layer, numbers, (20, 39, 40), [1, 0, 2], params=params)
        for layer in (near, far)
    ]
    assert torch.equal(*outs)
    for a, b in zip(planes(near), planes(far), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    gather = {each.name: each for each in gather_op.CANDIDATES}[implementation].load()
    table = torch.tensor([1, 0, 2], dtype=torch.int32, device=near.device)
    assert torch.equal(*(gather(x.key, table, 40, torch.float32) for x in (near, far)))


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_full_pool_gives_nobodys_pages_away(name):
    """vLLM #50702: with the pool saturated, pages of a remembered prefix were used by others."""
    engine = Engine(name)
    remembered = PrefixCache(engine.pool, ENGINE_PAGE, b"seed", engine.exact_pool)
    whole = engine.step(engine.request(), 75)
    prompt = list(range(75))
    donor = engine.request()
    engine.step(donor, 75)
    remembered.insert(prompt, donor)
    donor.free()
    reader = engine.request()
    reader.adopt(remembered.acquire(prompt[:-1]))
    kept, start = (engine.q, engine.k, engine.v), reader.length
    # Others take every page that is left, and all that the prefix cache can do without.
    engine.q, engine.k, engine.v = (torch.randn_like(x) * 9 for x in kept)
    others = []
    while engine.pool.free > 5:
        others.append(engine.request())
        engine.step(others[-1], 75)
    remembered.evict(100)
    engine.q, engine.k, engine.v = kept
    assert others and engine.pool.free <= 5
    close(engine.step(reader, 75 - start), whole[start:])


@pytest.mark.cpu
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["int8", "fp8", "none"])
def test_a_long_context_does_not_drift(implementation, name):
    """vLLM #23813: sums of weights and values in few bits, which collapse at long contexts."""
    form, context = FORMATS[name], 30_000
    pages = -(-context // 256)
    layout = CacheLayout(KV, WIDTH, form, 256, torch.float32)
    cache = PagedKVCache(pages)
    cache.add_layer(0, layout)
    serving = attention(implementation, form, torch.float32, page=256)
    _, k, v = rows(context, torch.float32)
    table = list(range(pages))
    whole = plan_batch([context], [context], [table], 256)
    # All values alike but for a little noise: a drifting sum shows in the mean.
    serving.write_step(None, k * 0.1, v * 0.1 + 1, cache.layer(0), whole, W)
    q, _, _ = rows(1, torch.float32)
    batch = plan_batch([1], [context], [table], 256)
    out, lse = serving.attend_step(q, cache.layer(0), batch, A)
    wanted, wanted_lse = oracle(q.double(), cache.layer(0), batch, A)
    if cache.layer(0).value.spec.rotation == "hadamard":
        wanted = rotate(wanted)
    assert relative(out, wanted) < 1e-3
    assert (lse.double() - wanted_lse).abs().max() < 1e-3
