"""The advisor: the best sum there is, bits as they are held, a line that attach takes."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from quantpage import attach
from quantpage.errors import FormatError
from quantpage.evaluate.advise import advise, best_choices, choose, pairs_of
from quantpage.evaluate.score import Window
from quantpage.evaluate.sensitivity import Part, measure_losses, parts_of
from quantpage.formats import FORMATS, find_format
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.sizes import cache_shape
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

EIGHT_FOUR = [FORMATS["int8"], FORMATS["int4"]]
PAGE = {"page_size": 16, "context": 2000}


def windows(length=160, scored=40):
    return [Window(tokens(1, length, seed), length - scored) for seed in (5, 6)]


def made_up(shape, candidates, seed=0):
    """Losses that fall with the bits, each layer with weights of its own."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for part in parts_of(shape.paged, pairs_of(candidates)):
        weight = 10 ** float(torch.rand((), generator=noise) * 3 - 6)
        bits = FORMATS[part.format].key.code.bits
        found[part] = weight * 4 ** (8 - bits) / (8 if part.exact else 1)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_all_is_better(seed):
    noise = np.random.default_rng(seed)
    sizes, losses = noise.integers(1, 9, (4, 4)), noise.random((4, 4))
    front = best_choices(sizes, losses)
    every = [
        (sum(s[o] for s, o in zip(sizes, options, strict=True)),
         sum(x[o] for x, o in zip(losses, options, strict=True)))
        for options in product(range(4), repeat=4)
    ]  # fmt: skip
    for budget in range(4, 37):
        fits = [loss for size, loss in every if size <= budget]
        places = np.flatnonzero(front.sizes <= budget)
        assert bool(fits) == bool(len(places))
        if fits:
            size, loss, options = front.choice(int(places[-1]))
            assert loss == pytest.approx(min(fits))
            assert size == sum(s[o] for s, o in zip(sizes, options, strict=True)) <= budget
            assert loss == pytest.approx(sum(x[o] for x, o in zip(losses, options, strict=True)))


def test_thinning_loses_little():
    noise = np.random.default_rng(3)
    sizes = noise.random((30, 6))
    # The larger, the less is lost.
    losses = (1 - sizes) ** 2 * 10.0 ** noise.integers(0, 3, (30, 1))
    whole, thin = best_choices(sizes, losses, 1 << 16), best_choices(sizes, losses, 4096)
    assert len(thin.sizes) <= 4096 < len(whole.sizes)
    for budget in np.linspace(whole.sizes[0], whole.sizes[-1], 20)[1:]:
        best, near = (each.losses[each.sizes <= budget].min() for each in (whole, thin))
        assert near <= best * 1.02


def test_bits_are_those_that_are_held_and_the_line_names_the_choice():
    model = tiny("llama", torch.float32)
    shape = cache_shape(model.config)
    losses = made_up(shape, EIGHT_FOUR)
    found = choose(shape, losses, 9.0, candidates=EIGHT_FOUR, **PAGE)
    assert found.chosen.bits <= 9.0
    assert LayerFormats.parse(found.chosen.line) == found.chosen.formats
    plans = replace(shape, dtype=torch.bfloat16).layers(found.chosen.formats, 16)
    held = sum(each.held_bytes(2000) for each in plans)
    sixteen = sum(each.unquantized_bytes(2000) for each in plans)
    assert found.chosen.bits == pytest.approx(16 * held / sixteen)
    with attach(model, found.chosen.line, page_size=16), torch.inference_mode():
        model(tokens(1, 40))
    bits, lost = zip(*((each.bits, each.loss) for each in found.curve), strict=True)
    assert list(bits) == sorted(bits) and list(lost) == sorted(lost, reverse=True)
    assert {each.line for each in found.uniform} == {"int8", "int4"}


def test_any_budget_is_kept_and_no_uniform_format_is_better():
    shape = cache_shape(tiny("llama", torch.float32).config)
    forms = [FORMATS[name] for name in ("none", "int8", "int4")]
    losses = made_up(shape, forms, seed=4)
    for budget in (7.0, 8.0, 9.5, 12.0, 16.5):
        found = choose(shape, losses, budget, candidates=forms, **PAGE)
        assert found.chosen.bits <= budget
        for each in found.uniform:
            assert each.bits > budget or each.loss >= found.chosen.loss


def test_exact_pages_count_as_bits_and_as_what_they_save():
    """A request that is hardly longer than what is kept exact gains nothing by 4 bits."""
    shape = cache_shape(tiny("llama", torch.float32).config)
    losses = made_up(shape, EIGHT_FOUR)
    given = {"candidates": EIGHT_FOUR, "page_size": 16}
    long = choose(shape, losses, 12.0, context=4096, **given)
    short = choose(shape, losses, 12.0, context=96, **given)
    assert {each.line for each in long.uniform if each.bits < 8} == {"int4"}
    assert min(short.uniform, key=lambda each: each.bits).line == "int8"
    # int8 keys beside 4-bit values are read exactly as often as those.
    pairs = pairs_of(EIGHT_FOUR)
    parts = parts_of([0], pairs)
    assert Part(0, "key", "int8", True) in parts and Part(0, "key", "int8", False) in parts
    assert Part(0, "key", "int4", False) not in parts
    assert set(pairs) == {*EIGHT_FOUR, FORMATS["k8v4"], find_format("k=int4,v=int8")}


def test_near_pages_in_int8_are_choices_of_their_own():
    forms = [FORMATS["int8"], FORMATS["int4"], find_format("int4_near8")]
    pairs = pairs_of(forms)
    assert {form.name for form in pairs} == {
        "int8", "int4", "int4_near8", "k8v4", "k8v4_near8", "k=int4,v=int8",
        "k=int4_near8,v=int8",
    }  # fmt: skip
    shape = cache_shape(tiny("llama", torch.float32).config)
    parts = parts_of(shape.paged, pairs)
    losses = {part: 1e-4 if part.format == "int8" else 1e-3 for part in parts}
    found = choose(shape, losses, 16.0, candidates=forms, page_size=16, context=300)
    bits = {point.line: point.bits for point in found.uniform}
    assert bits["int4_near8"] < bits["int4"]
    # Of equal losses the fewer bytes.
    assert all("int4," not in point.line and point.line != "int4" for point in found.curve)


def test_a_layer_is_measured_alone():
    model = tiny("llama", torch.float32)
    pairs = pairs_of(EIGHT_FOUR)
    parts = parts_of([1], pairs)
    losses = measure_losses(model, windows(), parts, EIGHT_FOUR, page_size=16)
    key = {(part.format, part.exact): loss for part, loss in losses.items() if part.half == "key"}
    assert 0 < key["int8", True] < key["int8", False] < key["int4", True]
    # The same through a format of both halves: errors of two halves add up.
    both = losses[Part(1, "key", "int4", True)] + losses[Part(1, "value", "int4", True)]
    with torch.inference_mode():
        (window, _) = windows()
        exact = model(window.tokens).logits[0, window.prompt - 1 : -1].double().log_softmax(-1)
        with attach(model, "none,layers=1:int4", page_size=16):
            near = model(window.tokens).logits[0, window.prompt - 1 : -1].double().log_softmax(-1)
    measured = float((exact.exp() * (exact - near)).sum(-1).mean())
    assert both == pytest.approx(measured, rel=0.5)


def test_what_is_advised_is_worth_it_on_other_tokens():
    """One layer is made touchy: it gets the bits, and the whole loses less than any format as
    small."""
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(6)
        model.model.layers[1].self_attn.o_proj.weight.mul_(4)
    calls = []
    found = advise(
        model, windows(), 9.0, candidates=("int8", "int4"), **PAGE, each=lambda: calls.append(0)
    )
    assert len(calls) == 2 * (6 * 3 + 1)
    chosen = found.chosen.formats.of_layers(3)
    four = next(each for each in found.uniform if each.line == "int4")
    assert chosen[1].key == FORMATS["int8"].key and found.chosen.loss < four.loss / 2

    def divergence(line):
        ids = tokens(1, 300, seed=11)
        with torch.inference_mode():
            exact = model(ids).logits.double().log_softmax(-1)
            with attach(model, line, page_size=16):
                near = model(ids).logits.double().log_softmax(-1)
        return float((exact.exp() * (exact - near)).sum(-1).mean())

    assert divergence(found.chosen.line) < divergence("int4") / 1.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 3.0}, r"budget: expected at least .* bits, the fewest that int8, int4 take"),
        ({"budget": float("nan")}, "budget: expected bits a number"),
        ({"candidates": ("int8_static",)}, "expected dynamic formats to choose from"),
        ({"candidates": ("none",)}, "expected a quantized format to choose from"),
        ({"candidates": ("int8,first1=int4",)}, "which has chosen already"),
        ({"candidates": ("int9",)}, "did you mean"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(changes, words):
    given = {"budget": 9.0, "candidates": ("int8", "int4"), **changes}
    with pytest.raises((FormatError, ValueError), match=words):
        advise(tiny("llama", torch.float32), [], **given)
