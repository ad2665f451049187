"""rope_write in the compiled core against its reference."""

from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.errors import NonFiniteInput
from quantpage.formats import CODES, FORMATS, KeyMap, QuantSpec
from quantpage.formats.feedback import with_feedback
from quantpage.ops.rope_write import QKNorm, WriteParams, cpu, reference
from quantpage.rope import rope_table
from tests.ops.cpu_cases import AVAILABLE, Shape, make_case
from tests.tolerances import fp8_ties

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not AVAILABLE, reason="no compiled core in this installation"),
]

SHAPE = Shape(128, 6, 2, 16, (5, 1, 3), (5, 20, 40))


def copied(layer: LayerKV) -> LayerKV:
    def side(pages):
        scale = None if pages.scale is None else pages.scale.clone()
        zero = None if pages.zero is None else pages.zero.clone()
        return replace(pages, codes=pages.codes.clone(), scale=scale, zero=zero)

    near = [None if x is None else x.clone() for x in (layer.exact_key, layer.exact_value)]
    return LayerKV(side(layer.key), side(layer.value), *near)


def planes(layer: LayerKV) -> list[torch.Tensor]:
    found = [layer.exact_key, layer.exact_value]
    for side in (layer.key, layer.value):
        found += [side.codes, side.scale, side.zero]
    return [plane for plane in found if plane is not None]


def ordinal(x: torch.Tensor) -> torch.Tensor:
    """e4m3 bit patterns in the order of their numbers."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits > 127, 128 - bits, bits)


def differences(ours: LayerKV, theirs: LayerKV) -> tuple[int, int]:
    """Numbers that differ, of how many; no code may be further off than one step."""
    differ = total = 0
    for mine, other in zip(planes(ours), planes(theirs), strict=True):
        if mine.dtype == torch.uint8:
            steps = [((x >> s) & 15).int() for s in (0, 4) for x in (mine, other)]
            off = torch.stack([steps[0] - steps[1], steps[2] - steps[3]]).abs()
        elif mine.dtype == torch.int8:
            off = (mine.int() - other.int()).abs()
        elif mine.dtype == torch.float8_e4m3fn:
            off = (ordinal(mine) - ordinal(other)).abs()
        else:
            # Float planes: the last bit of a sum may differ, nothing else.
            same = torch.isclose(mine.float(), other.float(), rtol=1e-2, atol=1e-6, equal_nan=True)
            assert same.all()
            continue
        assert off.amax() <= 1
        differ, total = differ + int((off != 0).sum()), total + off.numel()
    return differ, total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_writes_what_the_reference_writes(name, dtype):
    torch.manual_seed(0)
    cases = [
        (128, rope_table(64, 128), None),
        (80, None, None),
        (64, rope_table(64, 64, interleaved=True), False),
        (96, rope_table(64, 96), True),
        (256, rope_table(64, 64), False),
    ]
    differ = total = 0
    for head_dim, rope, after_rope in cases:
        _, layer, batch = make_case(FORMATS[name], replace(SHAPE, head_dim=head_dim), dtype)
        batch.slots[6] = -1
        norm = None
        if after_rope is not None:
            norm = QKNorm(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6, after_rope)
        # Slices of one projection, as models hand them over.
        qkv = torch.randn(9, 10, head_dim).to(dtype)
        q, k, v = qkv.split([6, 2, 2], dim=1)
        k[2, 0, 3], k[4, 0, 0], v[3, 1] = torch.nan, torch.inf, 0.0
        params = WriteParams(rope, norm, return_rows=True)
        theirs = copied(layer)
        want = reference.rope_write(q, k, v, theirs, batch, params)
        for isa in AVAILABLE:
            ours = copied(layer)
            got = cpu.rope_write(q, k, v, ours, batch, params, isa)
            off, of = differences(ours, theirs)
            differ, total = differ + off, total + of
            for mine, other in zip(got, want, strict=True):
                assert mine.dtype == other.dtype
                close = torch.isclose(mine.float(), other.float(), 2e-2, 2e-2, equal_nan=True)
                assert close.float().mean() > 0.999
    assert differ <= 1e-4 * total


def test_bias_and_missing_query():
    torch.manual_seed(1)
    _, layer, batch = make_case(FORMATS["int8"], SHAPE, torch.bfloat16)
    k, v = torch.randn(2, 9, 2, 128).to(torch.bfloat16)
    bias = tuple(torch.randn(heads, 128).to(torch.bfloat16) for heads in (6, 2, 2))
    ours, theirs = copied(layer), copied(layer)
    params = WriteParams(rope_table(64, 128), bias=bias)
    assert cpu.rope_write(None, k, v, ours, batch, params) == (None, None, None)
    reference.rope_write(None, k, v, theirs, batch, params)
    # A scale on a tie takes its row along.
    assert differences(ours, theirs)[0] <= 128


def test_checked_mode_refuses_before_writing():
    torch.manual_seed(2)
    _, layer, batch = make_case(FORMATS["int8"], SHAPE)
    k, v = torch.randn(2, 9, 2, 128)
    v[4, 1, 7] = torch.inf
    before = layer.key.codes.clone()
    with pytest.raises(NonFiniteInput, match="layer 3, value, token 4"):
        cpu.rope_write(None, k, v, layer, batch, WriteParams(checked=True, layer=3))
    assert torch.equal(layer.key.codes, before)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_fp8_ties_go_to_even(isa):
    ties, wanted = fp8_ties()
    rows = torch.cat([ties, torch.zeros(-len(ties) % 64)]).view(-1, 1, 64)
    spec = QuantSpec(CODES["fp8"], dynamic=False)
    codes = torch.zeros(1, 1, 16, 64, dtype=torch.float8_e4m3fn)
    half = QuantizedPages(spec, codes, torch.ones(1, 1, dtype=torch.float16))
    batch = plan_batch([len(rows)], [len(rows)], [[0]], 16)
    cpu.rope_write(None, rows, rows, LayerKV(half, half), batch, WriteParams(), isa=isa)
    held = codes.view(torch.uint8)[0, 0].flatten()[: len(ties)]
    assert torch.equal(held, wanted)


@pytest.mark.parametrize("name", ["int8", "int6", "int4", "int3"])
def test_every_instruction_set_rounds_in_turn(name):
    torch.manual_seed(4)
    _, layer, batch = make_case(FORMATS[name], SHAPE, torch.bfloat16)
    metric, signs = torch.randn(2, 128, 20), torch.randn(128).sign()
    key_map = with_feedback(
        KeyMap((torch.rand(2, 128) + 0.5) * signs, torch.randn(2, 128)),
        metric @ metric.mT,
        rotated=True,
    )
    k, v = torch.randn(2, 9, 2, 128).to(torch.bfloat16)
    theirs, plain = (replace(copied(layer), key_map=key_map) for _ in range(2))
    plain = replace(plain, key_map=KeyMap(key_map.scale, key_map.mean))
    reference.rope_write(None, k, v, theirs, batch, WriteParams())
    reference.rope_write(None, k, v, plain, batch, WriteParams())
    changed = (plain.key.codes != theirs.key.codes).sum()
    for isa in AVAILABLE:
        ours = replace(copied(layer), key_map=key_map)
        cpu.rope_write(None, k, v, ours, batch, WriteParams(), isa)
        # A tie that falls the other way moves all channels that are rounded after it.
        assert (ours.key.codes != theirs.key.codes).sum() < 0.1 * changed
