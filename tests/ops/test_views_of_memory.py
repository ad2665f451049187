"""What shapes and dtypes do not tell of a tensor: a gradient that is asked for, and memory that is
not what it says."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache, QuantizedPages
from quantpage.formats import FORMATS, KeyMap
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.gather import gather
from quantpage.ops.rope_write import QKNorm, WriteParams, rope_write
from quantpage.rope import RopeTable, rope_table

pytestmark = pytest.mark.cpu
TOKENS = 20
NAMES = ["torch", "cpu"]


def negated(x):
    """The same numbers, kept as their negatives, as ``imag`` of a conjugate is."""
    view = torch._neg_view(-x)
    assert view.is_neg() and torch.equal(view, x)
    return view


def step():
    noise = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, 4, 32, generator=noise)
    k, v = (torch.randn(TOKENS, 2, 32, generator=noise) for _ in range(2))
    cache = PagedKVCache(2)
    cache.add_layer(0, CacheLayout(2, 32, FORMATS["int8"], 16, torch.float32))
    return (q, k, v), cache.layer(0), plan_batch([TOKENS], [TOKENS], [[0, 1]], 16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_negated_rows_and_gradients_are_refused(which, name):
    rows, layer, batch = step()
    # What was passed once is asked again.
    rope_write(*rows, layer, batch, WriteParams(), name)
    before = layer.key.codes.clone(), layer.value.codes.clone()
    for make, said in (
        (negated, "expected numbers as they lie in memory, got a negated view"),
        (lambda x: (x + 1).requires_grad_(), "expected no gradient to be asked for"),
    ):
        wrong = list(rows)
        wrong[which] = make(rows[which])
        with pytest.raises(ValueError, match=f"^{'qkv'[which]}: {said}"):
            rope_write(*wrong, layer, batch, WriteParams(), name)
        assert torch.equal(layer.key.codes, before[0])
        assert torch.equal(layer.value.codes, before[1])
    with torch.no_grad():
        wrong[which] = rows[which].clone().requires_grad_()
        rope_write(*wrong, layer, batch, WriteParams(), name)
    assert torch.equal(layer.value.codes, before[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_query_of_attention_is_plain(name):
    (q, k, v), layer, batch = step()
    rope_write(q, k, v, layer, batch, WriteParams(), name)
    params = AttendParams(0.2)
    wanted, _ = attend(q, layer, batch, params, name)
    with pytest.raises(ValueError, match=r"^q: expected numbers as they lie in memory"):
        attend(negated(q), layer, batch, params, name)
    asked = q.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^q: expected no gradient .*no_grad\(\) or detach"):
        attend(asked, layer, batch, params, name)
    with torch.inference_mode():
        assert torch.equal(attend(asked, layer, batch, params, name)[0], wanted)
    assert torch.equal(attend(asked.detach(), layer, batch, params, name)[0], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_has_memory_of_its_own(name):
    (q, k, v), layer, batch = step()
    rope_write(q, k, v, layer, batch, WriteParams(), name)
    params, both = AttendParams(0.2), torch.empty(TOKENS + 1, 4, 32)
    both[:TOKENS] = q
    fused = torch.empty(TOKENS, 8, 32)
    fused[:, :4] = q
    wanted, _ = attend(q, layer, batch, params, name)
    for q_given, out, said in (
        (both[:TOKENS], both[1:], "memory of its own"),
        (q, torch.empty(1, 4, 32).expand(TOKENS, 4, 32), "each number in its own place"),
        (q, torch.empty(TOKENS, 4, 32, requires_grad=True), "no gradient to be asked for"),
        (q, negated(torch.empty(TOKENS, 4, 32).zero_()), "numbers as they lie in memory"),
    ):
        with pytest.raises(ValueError, match=f"^out: expected {said}"):
            attend(q_given, layer, batch, params, name, out=out)
        assert torch.equal(q_given, q)
    # Columns of one projection lie in turns.
    attend(fused[:, :4], layer, batch, params, name, out=fused[:, 4:])
    torch.testing.assert_close(fused[:, 4:], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_negated_parameters_mean_what_they_say(name):
    rows, layer, batch = step()
    rope, weights = rope_table(TOKENS, 32), (torch.rand(32) + 0.5, torch.rand(32) + 0.5)
    bias = tuple(torch.randn(heads, 32) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    found = []
    for view in (lambda x: x, negated):
        params = WriteParams(
            RopeTable(view(rope.cos), view(rope.sin)),
            QKNorm(*map(view, weights)),
            tuple(map(view, bias)),
        )
        q = rope_write(*rows, layer, batch, params, name).q
        out, _ = attend(q, layer, batch, AttendParams(0.2, sinks=view(sinks)), name)
        found.append((layer.key.codes.clone(), layer.value.codes.clone(), q, out))
    assert all(torch.equal(plain, other) for plain, other in zip(*found, strict=True))


def test_negated_pages_are_no_view():
    pages = torch.randn(2, 2, 16, 32)
    with pytest.raises(ValueError, match="codes: expected numbers as they lie in memory"):
        QuantizedPages(FORMATS["none"].key, negated(pages))
    spec, codes = FORMATS["int8_static"].key, torch.zeros(2, 2, 16, 32, dtype=torch.int8)
    given = torch.rand(2, 32)
    kept = QuantizedPages(spec, codes, negated(given)).scale
    assert torch.equal(kept, given) and not kept.is_neg()
    with pytest.raises(ValueError, match="scale: expected a contiguous float32 tensor"):
        KeyMap(negated(given))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_table_of_gather_is_a_tensor(name):
    _, layer, _ = step()
    with pytest.raises(ValueError, match=r"^page_table: expected a tensor, got list"):
        gather(layer.key, [0, 1], TOKENS, torch.float32, name)
