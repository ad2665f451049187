"""Rows joined by a warp each, beside triton_cuts and float64; needs a GPU of capability 9.0."""

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    HOPPER,
    ON_HOPPER,
    TOLERANCE,
    Step,
    assert_agrees,
    candidate,
    make_step,
    relative,
)

# isort: split
from quantpage.formats import FORMATS
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend import attend as attend_op
from quantpage.ops.attend.reference import attend as reference

pytestmark = ON_HOPPER
if HOPPER:
    from quantpage.ops.attend.decode import gluon

UNLIKE = Step((16, 1, 3), (300, 20_000, 950), page_size=64, head_dim=128)
"""Rows of one piece, of a few and of more than are joined at once."""
WINDOW = CausalMask(window=130, sink_tokens=20)


@pytest.fixture
def run(monkeypatch):
    """attend by way of gluon_join, and of triton_cuts; in float32, which hides nothing."""

    def both(q, layer, batch, params, **wanted):
        given = q.float(), layer, batch, params, candidate("decode.gluon")
        made, asked = [], []
        for together in (4, 0):
            monkeypatch.setattr(
                gluon, "joined_together", lambda *step, by=together: asked.append(step) or by
            )
            made.append(attend_op(*given, **wanted))
        assert len(asked) == 2
        return made

    return both


def assert_same(one, other):
    """But for the order in which pieces are summed."""
    assert relative(one[0], other[0]) < 2e-6
    if one[1] is None:
        assert other[1] is None
        return
    assert torch.equal(one[1].isneginf(), other[1].isneginf())
    torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        UNLIKE,
        Step((8, 1, 3), (700, 33, 150), page_size=64, head_dim=128),
        Step((3, 0, 2), (70, 0, 150), page_size=64, head_dim=128, group=7),
        Step((1, 0, 1), (700, 40, 150), page_size=64, head_dim=128, group=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, FullMask()], ids=str)
def test_pieces_join_to_what_triton_cuts_makes_of_them(step, mask, sinks, run):
    spec = FORMATS["int8"].key
    q, layer, batch = make_step(spec, spec, step, mask)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, sink)
    one, other = run(q, layer, batch, params)
    assert_same(one, other)
    wanted = reference(q.double(), layer, batch, params)
    assert_agrees(*one, *wanted, TOLERANCE, 10 * TOLERANCE)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["int4", "k8v4"])
@pytest.mark.parametrize("new", [1, 8])
def test_exact_pages_enter_and_rows_are_turned_back(name, new, sinks, run):
    given = FORMATS[name]
    step = Step((new, 1, min(new, 3)), UNLIKE.contexts, page_size=64, head_dim=128)
    q, layer, batch = make_step(given.key, given.value, step, CAUSAL, exact=True)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, CAUSAL, None, sink)
    for turned in (False, True):
        one, other = run(q, layer, batch, params, model_basis=turned, lse_wanted=not turned)
        assert_same(one, other)
        wanted, _ = attend_op(q.double(), layer, batch, params, "torch", model_basis=turned)
        assert relative(one[0], wanted) < TOLERANCE


def test_a_row_may_begin_in_a_program_that_has_ended_another(run):
    """More rows than programs: no plan cuts them evenly, and first pieces lie in second places."""
    contexts = tuple(33 + 97 * n % 900 for n in range(60))
    step = Step((1,) * 60, contexts, page_size=64, kv_heads=5, head_dim=128)
    q, layer, batch = make_step(FORMATS["int8"].key, FORMATS["int8"].value, step, CAUSAL)
    assert_same(*run(q, layer, batch, AttendParams(q.shape[-1] ** -0.5)))
