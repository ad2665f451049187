"""Rounding in turn: the loss it is there to lower, and the rows it must not harm."""

import pytest
import torch

from quantpage.formats import (
    CODES,
    FORMATS,
    Granularity,
    KeyMap,
    QuantSpec,
    dequantize,
    quantize,
    rotate,
)
from quantpage.formats.feedback import quantize_with_feedback, with_feedback

pytestmark = pytest.mark.cpu

SPECS = {
    "int8": FORMATS["int8"].key,
    "int6": FORMATS["int6"].key,
    "int4": FORMATS["int4"].key,
    "int3": FORMATS["int3"].key,
    "symmetric": QuantSpec(CODES["int4"]),
    "groups": QuantSpec(CODES["int4"], Granularity(group=16), zero_point=True),
}


def metric_of(kv_heads=2, head_dim=64, seed=0):
    """Queries that mostly lie in a few directions."""
    noise = torch.Generator().manual_seed(seed)
    base = torch.randn(kv_heads, head_dim, head_dim, generator=noise, dtype=torch.float64)
    sizes = 0.7 ** torch.arange(head_dim, dtype=torch.float64)
    return torch.einsum("hij,j,hkj->hik", base, sizes, base)


def made(spec, head_dim=64):
    key_map = KeyMap(torch.rand(2, head_dim) + 0.5)
    return with_feedback(key_map, metric_of(head_dim=head_dim), spec.rotation == "hadamard")


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("name", SPECS)
def test_scores_are_nearer_than_by_plain_rounding(name, head_dim):
    torch.manual_seed(0)
    spec = SPECS[name]
    key_map, metric = made(spec, head_dim), metric_of(head_dim=head_dim)
    k = torch.randn(200, 2, head_dim)
    turn = rotate if spec.rotation == "hadamard" else (lambda x: x)
    x = turn(key_map.keys(k))
    losses = []
    for codes in (quantize(x, spec), quantize_with_feedback(x, spec, key_map.feedback)):
        back = key_map.restored(turn(dequantize(*codes, spec)))
        error = (back - k).double()
        losses.append(torch.einsum("thi,hij,thj->th", error, metric, error).mean())
    assert losses[1] < 0.5 * losses[0]


def test_what_errors_are_multiplied_with_is_exact_in_sixteen_bits():
    """Every implementation takes it as it is, tensor cores too."""
    lower = made(SPECS["int4"]).feedback.tril(-1)
    assert torch.equal(lower, lower.half().float()) and lower.any()


def test_of_an_even_metric_and_whole_range_it_is_plain_rounding():
    spec = SPECS["int8"]
    flat = with_feedback(KeyMap(torch.ones(1, 64)), torch.eye(64)[None], True)
    x = torch.randn(50, 1, 64)
    for mine, plain in zip(
        quantize_with_feedback(x, spec, flat.feedback), quantize(x, spec), strict=True
    ):
        assert (mine is None and plain is None) or torch.equal(mine, plain)


@pytest.mark.parametrize("name", SPECS)
def test_hard_rows_stay_finite_and_zero_stays_zero(name):
    spec = SPECS[name]
    x = torch.randn(8, 2, 64)
    x[0], x[1], x[2] = 0.0, 3e38, 1e-41
    x[3, :, 5], x[4, 0, 1], x[5] = torch.nan, torch.inf, -2.5
    feedback = made(spec).feedback
    back = dequantize(*quantize_with_feedback(x, spec, feedback), spec)
    assert torch.isfinite(back).all()
    assert back[0].abs().max() <= 1e-6
    untouched = quantize_with_feedback(x[6:], spec, feedback)
    assert torch.equal(dequantize(*untouched, spec), back[6:])


def test_given_scales_are_kept():
    spec = FORMATS["int8_static"].key
    scale = torch.full((2, 64), 0.02)
    key_map = made(spec)
    x = key_map.keys(torch.randn(100, 2, 64))
    found = quantize_with_feedback(x, spec, key_map.feedback, scale)
    assert found.scale is None and found.codes.dtype == torch.int8
    error = dequantize(found.codes, scale, None, spec) - x
    assert error.abs().median() < 0.05


def test_impossible_metrics_say_what_is_wrong():
    key_map = KeyMap(torch.ones(2, 8))
    with pytest.raises(
        ValueError, match=r"metric: expected \(2, 8, 8\) as the key map, got \(8, 8\)"
    ):
        with_feedback(key_map, torch.eye(8), True)
    with pytest.raises(ValueError, match="metric: expected finite numbers"):
        with_feedback(key_map, torch.full((2, 8, 8), torch.nan), True)
