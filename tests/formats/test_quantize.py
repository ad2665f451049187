"""quantize, dequantize: rounding, hard rows, packing.

The error of a number that its group's range covers is half a step; what the rounding of the scale
or zero to 16 bits leaves outside the range is clipped. Both bounds are computed from the
scale and zero that came back, in float64, so that nothing is assumed about the data.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, dequantize, quantize
from quantpage.formats.quantize import pack, pack_nibbles, quantize_static, unpack, unpack_nibbles
from tests.tolerances import fp8_ties

pytestmark = pytest.mark.cpu

INT3, INT4, INT6, INT8, FP8 = (CODES[name] for name in ("int3", "int4", "int6", "int8", "fp8"))
SPECS = {
    "int8": QuantSpec(INT8),
    "int8_groups": QuantSpec(INT8, Granularity(32)),
    "int8_zero": QuantSpec(INT8, zero_point=True),
    "int8_wide_scale": QuantSpec(INT8, scale_dtype=torch.float32),
    "int4": QuantSpec(INT4),
    "int4_zero": QuantSpec(INT4, zero_point=True),
    "int4_zero_groups": QuantSpec(INT4, Granularity(16), zero_point=True),
    "int6": QuantSpec(INT6),
    "int6_zero": QuantSpec(INT6, zero_point=True),
    "int3_zero": QuantSpec(INT3, zero_point=True),
    "int3_groups": QuantSpec(INT3, Granularity(32)),
    "fp8": QuantSpec(FP8),
    "fp8_groups": QuantSpec(FP8, Granularity(32)),
}
HEAD_DIM = 96


def hard_rows():
    """[rows, 96], each row a way to go wrong; all finite and within float16's range."""
    normal = torch.randn(HEAD_DIM)
    outlier = normal.clone()
    outlier[17] = 1e4
    return torch.stack(
        [
            torch.zeros(HEAD_DIM),
            torch.full((HEAD_DIM,), 3.7),
            torch.full((HEAD_DIM,), -1e-30),
            normal,
            outlier,
            -outlier,
            torch.full((HEAD_DIM,), 1e-41),
            normal * 1e-38,
            normal * 1e-7,
            normal * 1e-4,
            normal + 1000.0,
            normal.abs() * 1e4,
            torch.cat([torch.zeros(48), torch.full((48,), 5.0)]),
        ]
    )


def bound(x, quantized, spec):
    """Largest error that quantizing may make, a number: half a step, or what is out of range."""
    groups = quantized.scale.shape[-1]
    x = x.double().unflatten(-1, (groups, -1))
    scale = quantized.scale.double().unsqueeze(-1)
    zero = 0.0 if quantized.zero is None else quantized.zero.double().unsqueeze(-1)
    if spec.code.name == "fp8":
        # e4m3 has 3 fraction bits, and steps of 2^-9 below 2^-6.
        inside = torch.maximum((x / scale).abs() * 2.0**-4, torch.tensor(2.0**-10)) * scale
    else:
        inside = scale / 2
    low = -spec.code.qmax if quantized.zero is None else spec.code.qmin
    clipped = torch.maximum(x - (zero + scale * spec.code.qmax), zero + scale * low - x)
    error = torch.maximum(inside.expand_as(x), clipped + inside)
    # Float32 arithmetic of the quantizer and of dequantize.
    return (error + 4 * 2.0**-24 * (x.abs() + scale * spec.code.qmax)).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_round_trip_is_within_half_a_step(name, dtype):
    spec, x = SPECS[name], hard_rows().to(dtype)
    quantized = quantize(x, spec)
    seen = dequantize(*quantized, spec, torch.float64)
    error = (seen - x.double()).abs()
    assert (error <= bound(x, quantized, spec)).all()


@pytest.mark.parametrize("name", SPECS)
def test_little_is_clipped(name):
    """What is out of range is no more than the rounding of scale and zero to 16 bits explains."""
    spec, x = SPECS[name], hard_rows()
    quantized = quantize(x, spec)
    unit, tiny = 2.0**-11, 2.0**-25
    if spec.scale_dtype == torch.float32:
        unit, tiny = 2.0**-24, 2.0**-150
    groups = quantized.scale.shape[-1]
    work = x.double().unflatten(-1, (groups, -1))
    scale = quantized.scale.double().unsqueeze(-1)
    zero = torch.zeros(()) if quantized.zero is None else quantized.zero.double().unsqueeze(-1)
    low = -spec.code.qmax if quantized.zero is None else spec.code.qmin
    out = torch.maximum(work - (zero + scale * spec.code.qmax), zero + scale * low - work)
    steps = spec.code.qmax - low
    allowed = unit * (zero.abs() + steps * scale) + (steps + 1) * tiny
    assert (out <= allowed * 1.01).all()


@pytest.mark.parametrize("name", SPECS)
def test_zeros_come_back_and_weigh_nothing(name):
    """Whoever multiplies probabilities by scales must not find a row of zeros large."""
    spec = SPECS[name]
    quantized = quantize(torch.zeros(3, HEAD_DIM), spec)
    assert (quantized.scale > 0).all() and (quantized.scale <= 2.0**-24).all()
    assert (dequantize(*quantized, spec) == 0).all()


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-8, 1e-6, 1e-5])
@pytest.mark.parametrize("level", [0.02, -0.02, 3.1, 2.0**-20, 1000.0])
@pytest.mark.parametrize("name", SPECS)
def test_a_nearly_constant_row_is_kept(name, level, spread):
    """Within a step of its range, and what rounding scale and zero to 16 bits leaves outside."""
    spec = SPECS[name]
    x = level + spread * torch.linspace(-1, 1, HEAD_DIM)[None]
    seen = dequantize(*quantize(x, spec), spec, torch.float64)
    steps = 2 * spec.code.qmax if spec.code.name != "fp8" else 16.0
    span = (x.max() - x.min()) if spec.zero_point else 2 * x.abs().max()
    allowed = span / steps + x.abs().max() * 2.0**-11 + (2 * spec.code.qmax + 2) * 2.0**-25
    assert (seen - x).abs().max() <= allowed


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.zero_point])
def test_a_constant_row_is_kept_by_its_zero(name):
    spec = SPECS[name]
    constant = torch.tensor([3.0, -0.5, 1024.0, 6.1035e-05]).half().float()
    x = constant[:, None].expand(-1, HEAD_DIM)
    assert torch.equal(dequantize(*quantize(x, spec), spec), x)


@pytest.mark.parametrize("name", SPECS)
def test_numbers_too_small_for_a_scale_become_zero(name):
    spec = SPECS[name]
    seen = dequantize(*quantize(torch.randn(4, HEAD_DIM) * 1e-42, spec), spec)
    limit = 1e-40 if spec.scale_dtype == torch.float32 else 0.0
    assert (seen.abs() <= limit).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SPECS)
def test_a_non_finite_number_stays_in_its_row(name, bad):
    spec, x = SPECS[name], torch.randn(5, 2, HEAD_DIM)
    clean = quantize(x, spec)
    x[2, 1, 40] = bad
    dirty = quantize(x, spec)
    others = torch.ones(5, 2, dtype=torch.bool)
    others[2, 1] = False
    for before, after in zip(clean, dirty, strict=True):
        if before is not None:
            assert torch.equal(before.view(torch.uint8)[others], after.view(torch.uint8)[others])
    assert dequantize(*dirty, spec, torch.float64).isfinite().all()


@pytest.mark.parametrize("name", SPECS)
def test_the_largest_float32_does_not_overflow(name):
    spec = SPECS[name]
    x = torch.zeros(2, HEAD_DIM)
    x[:, 0], x[:, 1] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    quantized = quantize(x, spec)
    assert quantized.scale.isfinite().all()
    # A float32 scale times its largest code may round past float32; a float16 scale cannot.
    work = torch.float64 if spec.scale_dtype == torch.float32 else torch.float32
    assert dequantize(*quantized, spec, work).isfinite().all()


def test_halves_round_to_even():
    spec = QuantSpec(INT8)
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49, 3.51] + [0.0] * 8])
    codes = quantize(x, spec).codes
    assert codes[0, :8].tolist() == [127, 0, 2, 2, 0, -2, 3, 4]


def test_codes_come_from_the_rounded_scale():
    spec, x = QuantSpec(INT8), torch.randn(1000, 64)
    quantized = quantize(x, spec)
    again = (x / quantized.scale.float()).round().clamp(-127, 127)
    assert torch.equal(quantized.codes.float(), again)
    unrounded = (x / (x.abs().amax(-1, keepdim=True) / 127)).round()
    assert not torch.equal(quantized.codes.float(), unrounded)


def test_fp8_is_cast_directly_and_saturates():
    spec = QuantSpec(FP8)
    x = torch.randn(50, 64)
    quantized = quantize(x, spec)
    wanted = (x / quantized.scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.codes.view(torch.uint8), wanted.view(torch.uint8))
    assert quantized.codes.float().isfinite().all()


def test_fp8_ties_go_to_even():
    ties, wanted = fp8_ties()
    spec = QuantSpec(FP8, dynamic=False)
    made = quantize_static(ties.view(-1, 1, 42), torch.ones(1, 1), None, spec)
    assert torch.equal(made.codes.view(torch.uint8).flatten(), wanted)


def test_the_none_code_is_only_cast():
    spec, x = FORMATS["none"].key, torch.randn(3, 64).bfloat16()
    quantized = quantize(x, spec)
    assert quantized.scale is None and quantized.zero is None
    assert torch.equal(dequantize(*quantized, spec), x.float())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("code", [INT8, INT4, FP8])
def test_static_scales(code, zero_point, groups, heads):
    if code is FP8 and zero_point:
        pytest.skip("fp8 takes no zero point")
    group = None if groups == 1 else 64 // groups
    spec = QuantSpec(code, Granularity(group, heads > 1), dynamic=False, zero_point=zero_point)
    x = torch.randn(7, 3, 64)
    scale = torch.rand(spec.granularity.scale_shape(heads, 64)) * 0.02 + 1.0
    zero = torch.rand_like(scale) if zero_point else None
    quantized = quantize_static(x, scale, zero, spec)
    assert quantized.scale is None
    seen = dequantize(quantized.codes, scale, zero, spec)
    assert (seen - x).abs().max() <= 1.02 / 2 + 1e-6


@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_nibbles(head_dim):
    codes = torch.randint(-8, 8, (5, 3, head_dim), dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3, head_dim // 2)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_the_low_nibble_is_the_even_channel():
    # Channel 0 holds -8 (stored 0), channel 1 holds 7 (stored 15).
    assert pack_nibbles(torch.tensor([-8, 7, 0, -1], dtype=torch.int8)).tolist() == [0xF0, 0x78]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    row=st.lists(
        st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=96, max_size=96
    ),
)
def test_any_row_gives_finite_numbers_within_the_bound(name, row):
    spec, x = SPECS[name], torch.tensor([row])
    quantized = quantize(x, spec)
    seen = dequantize(*quantized, spec, torch.float64)
    assert seen.isfinite().all()
    largest = torch.finfo(torch.float32).max
    kept = torch.nan_to_num(x.double(), nan=0.0, posinf=largest, neginf=-largest)
    assert ((seen - kept).abs() <= bound(kept, quantized, spec)).all()


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(SPECS)), seed=st.integers(0, 1000), rows=st.integers(1, 9))
def test_rows_do_not_depend_on_their_neighbours(name, seed, rows):
    spec = SPECS[name]
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))
    together = quantize(x, spec)
    for row in range(rows):
        alone = quantize(x[row : row + 1], spec)
        for whole, part in zip(together, alone, strict=True):
            if whole is not None:
                assert torch.equal(whole[row : row + 1].view(torch.uint8), part.view(torch.uint8))


@pytest.mark.parametrize("code", [INT6, INT3], ids=lambda code: code.name)
@pytest.mark.parametrize("width", [16, 80, 256])
def test_planes_hold_every_code_where_they_say(code, width):
    codes = torch.randint(int(code.qmin), int(code.qmax) + 1, (5, 2, width))
    stored = pack(codes, code)
    assert stored.dtype == torch.uint8 and stored.shape == (5, 2, code.stored(width))
    assert code.stored(width) * 8 == width * code.bits
    assert code.channels(code.stored(width)) == width
    assert torch.equal(unpack(stored, code).long(), codes)
    # By the words of formats/spec, a channel at a time.
    start, taken, lifted = 0, 0, codes - int(code.qmin)
    for bits in code.fields:
        size = width * bits // 8
        for channel in range(width):
            byte = stored[..., start + channel % size].long() >> (bits * (channel // size))
            wanted = lifted[..., channel] >> taken
            assert torch.equal(byte % 2**bits, wanted % 2**bits)
        start, taken = start + size, taken + bits
    assert start == stored.shape[-1]
