"""Static scales from ranges."""

import pytest
import torch

from quantpage.errors import FormatError
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, dequantize, quantize_static
from quantpage.formats.channel_ranges import ChannelRanges

pytestmark = pytest.mark.cpu

SPECS = {
    "int8": FORMATS["int8_static"].key,
    "fp8": FORMATS["fp8_static"].key,
    "int4": FORMATS["int4_static"].key,
    "tensor": QuantSpec(CODES["int8"], Granularity(per_head=False), dynamic=False),
}


def rows(tokens=4000, seed=0):
    """Channels of sizes apart, about means of their own."""
    noise = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.arange(-4, 4).repeat(4)
    x = torch.randn(tokens, 2, 32, generator=noise) * sizes
    return x + torch.linspace(-1, 1, 64).view(2, 32)


def ranges(x, pieces=4):
    found = [ChannelRanges.of(each) for each in x.chunk(pieces)]
    return sum(found[1:], found[0])


def error(x, pair, spec):
    seen = dequantize(quantize_static(x, *pair, spec).codes, *pair, spec)
    return (seen - x).square().mean().item()


@pytest.mark.parametrize("rule", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("name", SPECS)
def test_scales_have_the_specs_shape_and_serve_other_tokens(name, rule):
    spec = SPECS[name]
    scale, zero = ranges(rows()).scales(spec, rule)
    assert tuple(scale.shape) == spec.granularity.scale_shape(2, 32)
    assert scale.dtype == spec.scale_dtype and (zero is not None) == spec.zero_point
    other = rows(seed=1)
    relative = error(other, (scale, zero), spec) / other.var().item()
    assert relative < {"int8": 1e-3, "fp8": 2e-3, "int4": 3e-2, "tensor": 5e-2}[name]


def test_absmax_covers_everything_in_any_number_of_texts():
    x, spec = rows(), SPECS["int8"]
    scale, _ = ranges(x, 1).scales(spec, "absmax")
    torch.testing.assert_close(scale.float() * 127, x.abs().amax(0), rtol=1e-3, atol=1e-3)
    assert torch.equal(scale, ranges(x, 7).scales(spec, "absmax")[0])


def test_an_outlier_costs_absmax_most():
    x, spec = rows(), SPECS["int4"]
    x[::97] *= 8
    found = ranges(x)
    plain = rows(seed=1)
    of = {
        rule: error(plain, found.scales(spec, rule), spec)
        for rule in ("absmax", "percentile", "mse")
    }
    assert of["mse"] < 0.5 * of["absmax"] and of["percentile"] < 0.5 * of["absmax"]


def test_what_cannot_be_says_why():
    found = ranges(rows())
    with pytest.raises(ValueError, match="scales: expected one of absmax, percentile, mse"):
        found.scales(SPECS["int8"], "best")
    x = rows()
    x[3, 1, 2] = torch.inf
    with pytest.raises(FormatError, match="finite numbers"):
        ranges(x).scales(SPECS["int8"], "absmax")
    zeros = ChannelRanges.of(torch.zeros(10, 2, 32)).scales(SPECS["int8"], "mse")[0]
    assert (zeros > 0).all()
