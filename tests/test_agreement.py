"""What tests and benches hold attention to: the reference's truth, and what is off is said."""

from dataclasses import replace

import pytest
import torch

from quantpage.agreement import allowed, plain_attention
from quantpage.formats import FORMATS
from quantpage.masks import CausalMask, FullMask, RowIntervals, document
from quantpage.ops.attend import AttendParams, reference
from tests.ops.cpu_cases import Shape, make_case
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu

SHAPE = Shape(64, 6, 2, 16, (5, 0, 1, 40), (40, 7, 131, 90))


def same_as_the_reference(q, layer, batch, params):
    got = plain_attention(torch.float64, q, layer, batch, params)
    for found, wanted in zip(got, reference.attend(q.double(), layer, batch, params), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_in_float64_it_is_the_reference(name):
    torch.manual_seed(0)
    q, layer, batch = make_case(FORMATS[name], SHAPE)
    for mask in (CausalMask(), CausalMask(window=20, sink_tokens=3), FullMask()):
        same_as_the_reference(q, layer, batch, AttendParams(0.125, mask))
    same_as_the_reference(q, layer, batch, AttendParams(0.125, softcap=2.0, sinks=torch.randn(6)))


def test_in_float64_it_is_the_reference_for_masks_and_latent_rows():
    case = cached("int4", [90])
    q, batch = case.step([(60, 90)])
    same_as_the_reference(q, case.layer, batch, AttendParams(0.2, document([50, 40])))
    torch.manual_seed(1)
    _, layer, batch = make_case(FORMATS["int8"], Shape(64, 3, 1, 16, (4,), (70,), value_dim=32))
    latent = replace(layer, latent=True)
    same_as_the_reference(torch.randn(4, 3, 96), latent, batch, AttendParams(0.1))


@pytest.fixture
def step():
    """What is wanted of a step of which every third query sees nothing."""
    torch.manual_seed(2)
    q, layer, batch = make_case(FORMATS["int8"], SHAPE)
    ends = torch.arange(131)
    rows = torch.stack([0 * ends, torch.where(ends % 3 == 0, 0, ends)], -1)
    return allowed(q, layer, batch, AttendParams(0.125, RowIntervals(rows[None, None, :, None])))


def test_what_is_off_is_said(step):
    out, lse = step.want.float(), step.want_lse.float()
    assert step.wrong(out, lse) == "" and step.wrong(out.bfloat16()) == ""
    seen = (~step.want_lse.isneginf()).nonzero()[0].tolist()
    empty = step.want_lse.isneginf().nonzero()[0].tolist()
    size = float(step.error[seen[1]])

    def changed(at, by):
        other = out.clone()
        other[(*at, 3)] += by
        return step.wrong(other, lse)

    assert changed(seen, 0.5 * size) == ""
    assert "more than allowed" in changed(seen, 2 * size)
    assert "more than allowed" in changed(seen, torch.nan)
    assert "sees nothing" in changed(empty, 1e-9)
    for at, by, said in (
        (seen, 2 * step.lse_error + 1e-3, "log-sum-exp: error"),
        (seen, torch.nan, "log-sum-exp: error"),
        (seen, -torch.inf, "-inf where a query sees nothing, and only there"),
    ):
        other = lse.clone()
        other[tuple(at)] += by
        assert said in step.wrong(out, other)
    other = lse.clone()
    other[tuple(empty)] = 0.0
    assert "only there" in step.wrong(out, other)


def test_a_head_is_allowed_what_its_own_values_cost():
    torch.manual_seed(3)
    q, layer, batch = make_case(FORMATS["none"], SHAPE)
    layer.value.codes[:, 1] *= 64
    wanted = allowed(q, layer, batch, AttendParams(0.125))
    assert wanted.error[3:].min() > 16 * wanted.error[:3].max()
    # bfloat16 may cost more, by the bits that it has less.
    wider = allowed(q, layer, batch, AttendParams(0.125), torch.bfloat16)
    assert (wider.error > 3 * wanted.error).all()
