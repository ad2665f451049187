"""The rotation by tensor-core products: its PTX, run here a warp at a time, against formats/rotate.

The layouts of mma.sync are those of the PTX manual; a GPU test runs the instructions themselves.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from triton.compiler.compiler import AsmDict

from quantpage.formats.rotate import hadamard_matrix
from quantpage.ops.rope_write import triton_products

pytestmark = pytest.mark.cpu

LANE = torch.arange(32)
ROW, QUAD = LANE // 4, LANE % 4


def mma(into, rows, signs, before):
    """m16n8k8 (one number a register) or m16n8k16 (two): registers are [32 lanes, numbers]."""
    per = rows[0].shape[1]
    left, right = torch.zeros(16, 8 * per), torch.zeros(8 * per, 8)
    for r in range(4):
        for j in range(per):
            left[ROW + 8 * (r % 2), per * QUAD + j + 4 * per * (r // 2)] = rows[r][:, j]
    for r in range(2):
        for j in range(per):
            right[per * QUAD + j + 4 * per * r, ROW] = signs[r][:, j]
    product = left @ right
    for r in range(4):
        into[r][:] = before[r] + product[ROW + 8 * (r // 2), 2 * QUAD + r % 2][:, None]


def run(text: str, inputs: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
    """The outputs, [32 lanes] each."""
    held = {f"${outputs + i}": x.clone() for i, x in enumerate(inputs)}

    def at(name):
        name = name.strip()
        return held.setdefault(name, torch.zeros(32, 1))

    for line in text.strip("{}\n ").splitlines():
        name, _, rest = line.strip().rstrip(";").partition(" ")
        if name in (".reg", "mov.b32"):
            continue
        if name.startswith("mma"):
            into, rows, signs, before = (
                [at(n) for n in group.split(",")] for group in re.findall(r"\{(.*?)\}", rest)
            )
            mma(into, rows, signs, before)
            continue
        to, *given = rest.split(",")
        first = at(given[0])
        if name == "and.b32":
            value = (first.view(torch.int32) & -8192).view(torch.float32)
        elif name == "xor.b32":
            value = -first
        elif name == "min.f32":
            value = torch.where(first.isnan(), 2.0**118, first.clamp(max=2.0**118))
        else:
            second = at(given[1])
            value = first + second if name == "add.f32" else first - second
        held[to.strip()] = value
    return [held[f"${i}"][:, 0] for i in range(outputs)]


def lanes(piece: torch.Tensor, per: int) -> list[torch.Tensor]:
    """[8 rows, 32 channels] -> registers of ``per`` numbers, [32 lanes, per] each."""
    held = piece.reshape(8, 4, 8 // per, per).reshape(32, 8 // per, per)
    return list(held.unbind(1))


def matrix() -> torch.Tensor:
    """``signs_of`` in torch."""
    row, channel = torch.arange(8)[:, None], torch.arange(32)[None, :]
    both = (channel // 8) & (row >> 1)
    odd = both ^ (both >> 1) ^ (channel & row) ^ (channel >> 1)
    return 1.0 - 2.0 * (odd & 1)


def rotated(text: str, *pieces: torch.Tensor, per: int = 1) -> torch.Tensor:
    inputs = [register for piece in (*pieces, matrix()) for register in lanes(piece, per)]
    outputs = run(text, inputs, 8 * len(pieces))
    rows = [torch.stack(outputs[i : i + 8], 1) for i in range(0, len(outputs), 8)]
    return torch.stack(rows).reshape(-1, 8, 32)


def test_signs_are_those_of_the_kernel():
    import inspect

    body = inspect.getsource(triton_products.signs_of.fn)
    for line in inspect.getsource(matrix).splitlines():
        if line.strip().startswith(("both", "odd")):
            assert line.strip() in body


HADAMARD = hadamard_matrix(32, torch.float32, torch.device("cpu")) * 32**0.5


@pytest.mark.parametrize("name", ["_PLAIN", "_GUARDED"])
def test_products_rotate_two_pieces_of_floats(name):
    torch.manual_seed(0)
    pieces = torch.randn(2, 8, 32)
    got = rotated(getattr(triton_products, name).value, *pieces)
    torch.testing.assert_close(got, pieces @ HADAMARD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["_HALF", "_BFLOAT"])
def test_products_rotate_a_piece_of_pairs(name):
    torch.manual_seed(0)
    piece = torch.randn(1, 8, 32)
    got = rotated(getattr(triton_products, name).value, *piece, per=2)
    torch.testing.assert_close(got, piece @ HADAMARD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["_HALF_TURN", "_BFLOAT_TURN"])
def test_products_turn_and_rotate_heads_of_a_token(name):
    """Without splitting into halves: the low ones are 0 here."""
    torch.manual_seed(0)
    heads, angles = torch.randn(2, 8, 64), torch.rand(32)
    cos, sin = angles.cos(), angles.sin()
    # ``turn_factors``: the signs of a pair of channels and a row.
    row, channel = torch.arange(8)[:, None], torch.arange(32)[None, :]
    both = (channel // 8) & (row >> 1)
    sign = 1.0 - 2.0 * ((both ^ (both >> 1) ^ (channel & row)) & 1)
    none = torch.zeros(8, 32)
    tensors = [*heads[0].split(32, 1), *heads[1].split(32, 1)]
    tensors += [(cos + sin) * sign, none, (cos - sin) * sign, none]
    inputs = [register for tensor in tensors for register in lanes(tensor, 2)]
    outputs = run(getattr(triton_products, name).value, inputs, 32)
    rows = [torch.stack(outputs[i : i + 8], 1).reshape(8, 32) for i in range(0, 32, 8)]
    got = torch.stack([torch.cat(rows[:2], 1), torch.cat(rows[2:], 1)])
    x, y = heads.chunk(2, -1)
    turned = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
    matrix = hadamard_matrix(64, torch.float32, heads.device) * 8
    torch.testing.assert_close(got, turned @ matrix, rtol=1e-5, atol=2e-5)


def test_an_infinity_stays_one():
    pieces = torch.randn(2, 8, 32)
    pieces[0, 0, 3], pieces[0, 1, 5], pieces[1, 2, 1] = torch.inf, torch.nan, -torch.inf
    got = rotated(triton_products._GUARDED.value, *pieces)
    wanted = pieces @ HADAMARD
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_layouts_are_read():
    good = (
        "#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [8, 4], "
        "warpsPerCTA = [1, 1], order = [1, 0]}>\n"
        '%0:2 = tt.elementwise_inline_asm "mma.sync" {constraints = "=r", '
        "packed_element = 8 : i32, pure = true} %1 : tensor<8x32xf32, #blocked> "
        "-> tensor<8x32xf32, #blocked>, tensor<8x32xf32, #blocked>\n"
    )
    assert triton_products.layout_holds(good)
    # Whose elements stand alone may lie as they like.
    other = good.replace("#blocked", "#other").replace("[8, 4]", "[4, 8]")
    assert triton_products.layout_holds(good + other.replace("element = 8", "element = 1"))
    assert not triton_products.layout_holds(good + other)
    assert not triton_products.layout_holds(good.replace("[8, 4]", "[4, 8]"))
    assert not triton_products.layout_holds("")


def test_a_cache_of_binaries_alone_says_nothing_of_layouts():
    compiled = SimpleNamespace(hash="of binaries alone", asm=AsmDict(cubin=b""))
    assert not triton_products.as_written(compiled)
