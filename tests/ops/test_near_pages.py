"""Exact pages in int8: what they hold, who reads them, what they cost, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch

import quantpage
from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cpu_core import ISAS, find_core
from quantpage.errors import CorruptCache, FormatError
from quantpage.explain import candidates_of, example_call
from quantpage.formats import (
    CODES,
    FORMATS,
    ExactPages,
    Granularity,
    KVFormat,
    QuantSpec,
    dequantize,
    rotate,
)
from quantpage.formats.feedback import with_feedback
from quantpage.formats.key_map import KeyMap
from quantpage.formats.per_layer import LayerFormats
from quantpage.formats.table import find_format
from quantpage.hardware import DeviceInfo
from quantpage.ops.attend import AttendParams, attend, reference
from quantpage.ops.attend import cpu as attend_cpu
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rope_write import cpu as write_cpu
from quantpage.ops.rope_write import reference as write_reference
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

NAMES = ["int4_near8", "k8v4_near8", "k=int4_near8,v=int3_near8", "k=fp8,v=int4_near8"]
PAGE, TOKENS, HEADS = 16, 150, 2
CORE = find_core()


def filled(name, write, head_dim=64, key_map=None, seed=0):
    """A layer after one prompt, and its step."""
    torch.manual_seed(seed)
    form = find_format(name) if isinstance(name, str) else name
    pages = -(-TOKENS // PAGE)
    cache = PagedKVCache(pages=pages, exact_pages=pages)
    layout = CacheLayout(HEADS, head_dim, form, PAGE, torch.float32)
    cache.add_layer(0, layout, key_map=key_map)
    batch = plan_batch(
        [TOKENS], [TOKENS], [list(range(pages))], PAGE, exact_tables=[list(range(pages))]
    )
    k, v = torch.randn(2, TOKENS, HEADS, head_dim)
    write(None, k, v, cache.layer(0), batch, WriteParams())
    return cache, batch, k, v


def numbers(pages, half):
    """[tokens, kv_heads, head_dim], in the model's basis."""
    seen = dequantize(half.codes, half.scale, half.zero, half.spec)
    seen = rotate(seen) if half.spec.rotation == "hadamard" else seen
    return seen.transpose(1, 2).flatten(0, 1)[:pages]


@pytest.mark.parametrize("name", NAMES)
def test_near_pages_hold_every_row_finer_than_the_body(name):
    cache, _, k, v = filled(name, write_reference.rope_write)
    layer = cache.layer(0)
    for given, near, body in (
        (k, layer.exact().key, layer.key),
        (v, layer.exact().value, layer.value),
    ):
        errors = [
            float((numbers(TOKENS, half) - given).norm() / given.norm()) for half in (near, body)
        ]
        assert near.codes.dtype == torch.int8 and errors[0] < 0.02 and errors[0] <= errors[1]


@pytest.mark.skipif(CORE is None, reason="needs the compiled core")
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("name", NAMES)
def test_the_core_writes_and_reads_what_the_references_do(name, head_dim):
    theirs, batch, _, _ = filled(name, write_reference.rope_write, head_dim)
    ours, _, _, _ = filled(name, write_cpu.rope_write, head_dim)
    for one, other in zip(theirs.layer(0)._split(), ours.layer(0)._split(), strict=True):
        for half in ("key", "value"):
            same = getattr(one, half).codes.view(torch.uint8) == (
                getattr(other, half).codes.view(torch.uint8)
            )
            # A tie of the rotation's rounding falls the other way now and then.
            assert same.double().mean() > 0.999
    q = torch.randn(TOKENS, 4, head_dim) / 3
    params = AttendParams(head_dim**-0.5)
    wanted = reference.attend(q.double(), theirs.layer(0), batch, params)[0]
    near = {
        "torch": attend(q, theirs.layer(0), batch, params, "torch"),
        **{
            ISAS[isa]: attend_cpu.attend(q, theirs.layer(0), batch, params, isa=isa)
            for isa in range(CORE.isa + 1)
        },
    }
    for who, (out, _) in near.items():
        error = (out.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, f"{who}: {error:.1e}"


@pytest.mark.skipif(CORE is None, reason="needs the compiled core")
def test_near_keys_are_rounded_in_turn_as_well():
    metric = torch.randn(HEADS, 64, 12)
    key_map = with_feedback(KeyMap(torch.ones(HEADS, 64)), metric @ metric.mT, rotated=True)
    made = {}
    for name, write, mapped in (
        ("plain", write_reference.rope_write, replace(key_map, feedback=None)),
        ("torch", write_reference.rope_write, key_map),
        ("core", write_cpu.rope_write, key_map),
    ):
        cache, _, k, _ = filled("int4_near8", write, key_map=mapped)
        near = cache.layer(0).exact().key
        error = numbers(TOKENS, near) - k
        made[name] = float(torch.einsum("thi,hij,thj->", error, metric @ metric.mT, error))
    assert made["torch"] < 0.7 * made["plain"]
    assert made["core"] == pytest.approx(made["torch"], rel=0.05)


@pytest.mark.skipif(CORE is None, reason="needs the compiled core")
def test_near_keys_in_fp8_are_rounded_by_themselves():
    """A code of fp8 has no next one at an equal distance; the body's keys are rounded in turn."""
    fp8 = replace(FORMATS["fp8"].key, rotation="hadamard")
    mine = replace(find_format("int4_near8"), near=KVFormat("fp8", fp8, fp8))
    metric = torch.randn(HEADS, 64, 12)
    key_map = with_feedback(KeyMap(torch.ones(HEADS, 64)), metric @ metric.mT, rotated=True)
    held = []
    for write, mapped in (
        (write_reference.rope_write, replace(key_map, feedback=None)),
        (write_reference.rope_write, key_map),
        (write_cpu.rope_write, key_map),
    ):
        cache, _, k, _ = filled(mine, write, key_map=mapped)
        near = cache.layer(0).exact().key
        held.append(near.codes.view(torch.uint8).clone())
        assert float((numbers(TOKENS, near) - k).norm() / k.norm()) < 0.05
    assert torch.equal(held[0], held[1])
    assert (held[0] == held[2]).float().mean() > 0.999


@pytest.mark.parametrize("name", ["int4_near8", "k8v4_near8", "int4_near8,first1=int8,last1=int4"])
def test_models_take_it_and_the_cut_changes_nothing(name):
    model, ids = tiny("llama", torch.float32), tokens(2, 200)
    with torch.inference_mode():
        exact = model(ids).logits.double().log_softmax(-1)
        found = {}
        for each in (name, name.replace("_near8", "")):
            with quantpage.attach(model, each, page_size=16):
                found[each] = model(ids).logits.double().log_softmax(-1)
        with quantpage.attach(model, name, page_size=16) as attached:
            cache, pieces = attached.new_cache(), []
            for start, end in ((0, 70), (70, 71), (71, 130), (130, 200)):
                pieces.append(model(ids[:, start:end], past_key_values=cache).logits)
            cache.flush()
            held = cache.used_bytes()
            four = LayerFormats.parse(name.replace("_near8", ""))
        with quantpage.attach(model, four, page_size=16) as attached:
            cache = attached.new_cache()
            model(ids, past_key_values=cache)
            cache.flush()
            assert held < 0.9 * cache.used_bytes()
    cut = torch.cat(pieces, 1).double().log_softmax(-1)
    # The model's own products round another way in other cuts, which a code on a border follows.
    apart = (cut - found[name]).abs().amax(-1)
    assert float(apart.median()) < 1e-4 and float((apart > 5e-3).float().mean()) < 0.02
    assert float(apart.max()) < 0.1

    def divergence(other):
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    near, sixteen = (divergence(each) for each in found.values())
    assert near < 1.2 * sixteen + 0.004


def test_a_file_keeps_them(tmp_path):
    model, ids = tiny("llama", torch.float32), tokens(1, 150)
    with (
        torch.inference_mode(),
        quantpage.attach(model, "int4_near8,first1=int8", page_size=16) as attached,
    ):
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        attached.save_cache(cache, tmp_path / "kept")
        loaded = attached.load_cache(tmp_path / "kept")
        one, other = (
            each.rows.memory.shelves[next(iter(each.rows.memory.shelves))].store.layer(1).exact()
            for each in (cache, loaded)
        )
        assert other.key.codes.dtype == torch.int8 and other.key.codes.any()
        more = [model(ids[:, :4], past_key_values=each).logits for each in (cache, loaded)]
        assert float((more[0] - more[1]).abs().max()) < 5e-3
        assert one.key.spec == other.key.spec
        with (
            pytest.raises(CorruptCache),
            quantpage.attach(tiny("llama", torch.float32), "int4", page_size=16) as plain,
        ):
            plain.load_cache(tmp_path / "kept")


def test_pages_grow_and_are_copied_with_their_scales():
    cache, _, _, _ = filled("int4_near8", write_reference.rope_write)
    before = cache.layer(0).exact().key
    wanted = numbers(TOKENS, before)
    cache.grow(2, 3)
    after = cache.layer(0).exact().key
    assert after.pages == before.pages + 3
    assert torch.equal(numbers(TOKENS, after), wanted)
    layout = cache.layouts[0]
    assert cache.nbytes == sum(
        plane.nbytes
        for part in cache.layer(0)._split()
        for half in (part.key, part.value)
        for plane in (half.codes, half.scale, half.zero)
        if plane is not None
    )
    assert layout.exact_bytes_per_page() == 16 * HEADS * 2 * (64 + 2)


def test_names():
    four = find_format("int4_near8")
    assert four.name == "int4_near8" and four.near.key.code == CODES["int8"]
    assert replace(four, name="int4", near=None) == FORMATS["int4"]
    assert find_format("k=int8,v=int4_near8") == find_format("k8v4_near8")
    text = "int4_near8,first2=int8,layers=4:k=int8,v=int3_near8"
    assert LayerFormats.parse(text).name == text
    for name, words in (
        ("int8_near8", "expected a format with exact pages before _near8"),
        ("k=int4,v=int4_near8", "of both or of none"),
        ("k=none,v=int4_near8", "at least the body's 16 bits"),
        ("int9_near8", "got 'int9'"),
    ):
        with pytest.raises(FormatError, match=words):
            find_format(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exact_pages": None}, "near needs exact_pages"),
        ({"near": FORMATS["int8_exact"]}, "without exact_pages"),
        ({"near": FORMATS["none"]}, "codes and scales of its own"),
        ({"near": FORMATS["int8_static"]}, "codes and scales of its own"),
        ({"near": FORMATS["int3"]}, "without exact_pages"),
        ({"near": FORMATS["fp8"]}, "in the basis of the body"),
        ({"near": KVFormat("x", FORMATS["int3"].key, FORMATS["int8"].key)}, "at least the body's"),
    ],
)
def test_what_near_pages_cannot_be(changes, words):
    with pytest.raises(FormatError, match=words):
        replace(find_format("int4_near8"), **changes)


def test_kernels_take_it_where_they_take_its_codes():
    hopper = DeviceInfo("cuda", "H100", (9, 0), 132)
    four = find_format("int4_near8")
    grouped = QuantSpec(CODES["int8"], Granularity(group=32), rotation="hadamard")
    wide = QuantSpec(replace(CODES["int8"], name="mine"), rotation="hadamard")
    for near, op, words in (
        (four.near, "rope_write", None),
        (four.near, "prefill", None),
        (four.near, "decode", None),
        (four.near, "masked prefill", None),
        (KVFormat("g", grouped, grouped), "rope_write", None),
        (KVFormat("g", grouped, grouped), "decode", "one dynamic scale .* for near keys, got 4."),
        (KVFormat("w", wide, wide), "rope_write", "codes of formats/spec for near keys, got mine"),
        (KVFormat("w", wide, wide), "prefill", "codes of formats/spec for near values, got mine"),
    ):
        mask = "interval" if op.startswith("masked") else "causal"
        call = example_call(hopper, replace(four, near=near), mask)
        said = dict(candidates_of(call, op.removeprefix("masked ")))
        kernels = {who: said[who] for who in said if who.startswith(("triton", "gluon"))}
        served = [who for who, reasons in kernels.items() if not reasons]
        if words is None:
            assert served, (op, near, kernels)
        else:
            assert not served and any(re.search(words, " ".join(r)) for r in kernels.values())


def test_attention_serves_what_it_was_built_for():
    """Near pages of another kind would be read as what they are not."""
    cache, batch, k, v = filled("int4_near8", write_reference.rope_write)
    layer = cache.layer(0)
    call = replace(
        example_call(DeviceInfo("cpu", "cpu", None, 1), FORMATS["int4"]),
        dtype=torch.float32, q_heads=4, kv_heads=HEADS, head_dim=64, value_head_dim=64,
        page_size=PAGE,
    )  # fmt: skip
    built = quantpage.build_attention(quantpage.find_backend("flash"), quantpage.CausalMask(), call)
    with pytest.raises(ValueError, match="expected exact pages in 16 bits"):
        built(torch.randn(TOKENS, 4, 64), k, v, layer, batch, WriteParams(), AttendParams(64**-0.5))


def test_a_spec_of_ones_own():
    """fp8 near pages beside unrotated 4 bits."""
    body = QuantSpec(CODES["int4"], zero_point=True)
    fp8 = QuantSpec(CODES["fp8"])
    mine = KVFormat("mine", body, body, ExactPages(), near=KVFormat("fp8", fp8, fp8))
    model, ids = tiny("llama", torch.float32), tokens(1, 120)
    with torch.inference_mode():
        exact = model(ids).logits.double().log_softmax(-1)
        with quantpage.attach(model, mine, page_size=16):
            near = model(ids).logits.double().log_softmax(-1)
    assert 0 < float((exact.exp() * (exact - near)).sum(-1).mean()) < 0.3
