"""Products of a few tokens in the compiled core, against float64."""

import struct

import pytest
import torch
from torch.nn.functional import silu

from quantpage import cpu_core
from quantpage.cpu_core.interface import number
from quantpage.cpu_core.products import (
    MAX_TOKENS,
    Matrix,
    Norm,
    Projection,
    Rotary,
    SecondHalf,
    norm_record,
)

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(cpu_core.find_core() is None, reason=cpu_core.absence() or "-"),
]

ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Of one result, relative to all: sums are float32, results are rounded once."""
SIXTEEN_BITS = 5e-5
"""What 16-bit activations cost, where int8 weights are multiplied as bytes (AVX-512)."""
AVAILABLE = list(range(core.isa + 1)) if (core := cpu_core.find_core()) else []
BYTES = cpu_core.ISAS.index("avx512")
WIDTH, ATTENDED, INNER, DIM = 96, 128, 160, 32
EPS = 1e-5


def weight(rows, width, kind):
    """A matrix, and the numbers that it stands for."""
    numbers = torch.randn(rows, width) * width**-0.5
    if kind != torch.int8:
        return Matrix(numbers.to(kind)), numbers.to(kind).double()
    scale = (numbers.abs().amax(1) / 127).bfloat16()
    codes = (numbers / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Matrix(codes, scale), codes.double() * scale.double()[:, None]


def normed(x, norm):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()


def allowed(dtype, int8, isa):
    return max(ROUNDING[dtype], SIXTEEN_BITS if int8 and isa >= BYTES else 0)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, MAX_TOKENS])
def test_projections_with_norm_bias_and_rotary(tokens, int8, dtype, isa):
    torch.manual_seed(tokens)
    kind = torch.int8 if int8 else dtype
    # Rows that are no multiple of what the kernel takes at once.
    (q, q64), (k, k64), (v, v64) = (weight(rows, WIDTH, kind) for rows in (128, 64, 37))
    norm, bias = torch.randn(WIDTH).to(dtype), torch.randn(64).to(dtype)
    product = Projection([q, k._replace(bias=bias), v], Norm(norm, EPS))
    x = torch.randn(tokens, WIDTH).to(dtype)
    cos, sin = torch.randn(2, tokens, DIM).to(dtype)
    assert product.serves(dtype)
    got = product(x, Rotary(cos, sin, 6), isa)

    y = normed(x, norm)
    heads = torch.cat([y @ q64.T, y @ k64.T + bias.double()], 1).view(tokens, 6, DIM)
    swapped = torch.cat([-heads[..., DIM // 2 :], heads[..., : DIM // 2]], -1)
    turned = heads * cos.double()[:, None] + swapped * sin.double()[:, None]
    want = torch.cat([turned.flatten(1), y @ v64.T], 1)
    assert relative(got, want) < allowed(dtype, int8, isa)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_the_second_half_of_a_block(tokens, int8, dtype, isa):
    torch.manual_seed(tokens)
    kind = torch.int8 if int8 else dtype
    shapes = (WIDTH, ATTENDED), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    matrices, (out, gate, up, down) = zip(*(weight(*each, kind) for each in shapes), strict=True)
    norm = torch.randn(WIDTH).to(dtype)
    half = SecondHalf(matrices, Norm(norm, EPS))
    attended, x = torch.randn(tokens, ATTENDED).to(dtype), torch.randn(tokens, WIDTH).to(dtype)
    assert half.serves(dtype)
    got = half(attended, x, isa)

    y = x.double() + attended.double() @ out.T
    n = normed(y, norm)
    want = y + (silu(n @ gate.T) * (n @ up.T)) @ down.T
    assert relative(got, want) < allowed(dtype, int8, isa)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(half(attended, x, isa), got)
    finally:
        torch.set_num_threads(before)
    alone = [half(each[None], row[None], isa) for each, row in zip(attended, x, strict=True)]
    assert torch.equal(torch.cat(alone), got)


@pytest.mark.parametrize(("tokens", "width"), [(7, 256), (16, 256), (300, 256), (17, 3200)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_results_do_not_depend_on_threads_nor_on_other_tokens(kind, tokens, width):
    torch.manual_seed(0)
    product = Projection([weight(301, width, kind)[0]])
    assert product.serves(torch.bfloat16)
    x = torch.randn(tokens, width).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = product(x)
        torch.set_num_threads(3)
        assert torch.equal(product(x), want)
        assert torch.equal(torch.cat([product(each[None]) for each in x]), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("width", [1536, 1568, 3200, 8192])
@pytest.mark.parametrize("tokens", [1, 4])
def test_wide_rows_of_every_length(tokens, width, isa):
    torch.manual_seed(0)
    matrix, numbers = weight(21, width, torch.bfloat16)
    x = torch.randn(tokens, width).bfloat16()
    product = Projection([matrix])
    assert product.serves(torch.bfloat16)
    assert relative(product(x, isa=isa), x.double() @ numbers.T) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("width", [32, 64, 1568, 8192])
def test_int8_weights_at_their_ends(width, isa):
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (21, width), dtype=torch.int8)
    codes[:2], codes[2:4] = -128, 127
    matrix = Matrix(codes, torch.ones(21).bfloat16())
    x = torch.randn(3, width)
    # All of one sign; all alike, the largest sums; channels far apart; and rows of nothing.
    x[0], x[1], x[2, ::7] = x[0].abs(), -3, 1e4
    x = torch.cat([x, torch.zeros(1, width), torch.full((1, width), 1e-38)])
    product = Projection([matrix])
    assert product.serves(torch.float32)
    got, want = product(x, isa=isa), x.double() @ codes.double().T
    assert all(relative(got[i], want[i]) < SIXTEEN_BITS for i in range(3))
    assert not got[3].any() and got[4].abs().max() < 1e-30
    assert torch.equal(torch.cat([product(each[None], isa=isa) for each in x]), got)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_an_activation_that_is_not_finite_stays_in_its_token(odd, isa):
    torch.manual_seed(0)
    matrix = weight(40, 96, torch.int8)[0]
    product, x = Projection([matrix]), torch.randn(5, 96)
    assert product.serves(torch.float32)
    want = product(x, isa=isa)
    x[3, 70] = odd
    got = product(x, isa=isa)
    rest = [0, 1, 2, 4]
    assert torch.equal(got[rest], want[rest]) and not got[3].isfinite().any()


def test_what_is_not_finite_stays_in_its_row():
    matrix = weight(40, 64, torch.float32)[0]
    matrix.weight[3, 5] = torch.nan
    product = Projection([matrix])
    assert product.serves(torch.float32)
    got = product(torch.randn(2, 64))
    assert got[:, 3].isnan().all() and got.isnan().sum() == 2


@pytest.mark.parametrize(
    "matrices",
    [
        [Matrix(torch.zeros(8, 40))],
        [Matrix(torch.zeros(8, 64, dtype=torch.float64))],
        [Matrix(torch.zeros(8, 64), bias=torch.zeros(8).bfloat16())],
        [Matrix(torch.zeros(64, 8).T)],
        [Matrix(torch.zeros(8, 64)), Matrix(torch.zeros(8, 64).bfloat16())],
        [Matrix(torch.zeros(8, 64, dtype=torch.int8), torch.zeros(8))],
        [Matrix(torch.zeros(8, 64, device="meta"))],
    ],
)
def test_what_the_core_does_not_multiply(matrices):
    assert not Projection(matrices).serves(torch.float32)


def test_weights_that_move_are_found_again():
    linear = torch.nn.Linear(64, 8, bias=False)
    product, x = Projection([Matrix(linear.weight)]), torch.randn(1, 64)
    assert product.serves(torch.float32)
    linear.weight.data = torch.ones(8, 64)
    assert product.serves(torch.float32)
    torch.testing.assert_close(product(x), x.sum().expand(1, 8))
    linear.bfloat16()
    assert not product.serves(torch.float32) and product.serves(torch.bfloat16)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_norm_alone(dtype, isa):
    torch.manual_seed(0)
    x, norm = torch.randn(5, WIDTH).to(dtype), Norm(torch.randn(WIDTH).to(dtype), EPS)
    want = normed(x, norm.weight)
    record = norm_record(norm, x, isa)
    program = struct.pack("=2q", number("NORM"), len(record)) + record
    assert cpu_core.core().run(program, len(program), 2) == 0
    assert relative(x, want) < ROUNDING[dtype]


def test_a_program_of_an_unknown_step_says_so():
    program = struct.pack("=2q", 99, 0)
    assert cpu_core.core().run(program, len(program), 2) == 1


def test_more_threads_than_cores_meet_asleep():
    torch.manual_seed(0)
    shapes = (WIDTH, ATTENDED), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    half = SecondHalf(
        tuple(weight(*each, torch.bfloat16)[0] for each in shapes),
        Norm(torch.randn(WIDTH).bfloat16(), EPS),
    )
    attended, x = torch.randn(2, 4, ATTENDED).bfloat16(), torch.randn(2, 4, WIDTH).bfloat16()
    assert half.serves(torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [half(*each) for each in zip(attended, x, strict=True)]
        torch.set_num_threads(9)
        # In turn, so that nothing right is left in the core's memory by the call before.
        for i in 40 * (0, 1):
            assert torch.equal(half(attended[i], x[i]), want[i])
    finally:
        torch.set_num_threads(before)
