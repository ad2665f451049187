"""Decode's memory for every step up to a size: never less than a step asks for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage.attention import build_attention, find_backend
from quantpage.explain import DEVICES, example_call
from quantpage.formats import FORMATS
from quantpage.masks import CausalMask
from quantpage.ops.attend.decode import workspaces
from quantpage.ops.attend.decode.launch import decode_tiles, programs_of, row_tiles
from quantpage.ops.attend.decode.reserve import needed, reserve
from quantpage.ops.attend.decode.workspaces import counter_count, piece_sizes, workspace
from quantpage.ops.attend.latent import launch as latent
from quantpage.ops.attend.latent.reserve import needed as latent_needed

pytestmark = pytest.mark.cpu


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_step_up_to_the_size_asks_for_more(data):
    form = FORMATS[data.draw(st.sampled_from(["none", "int8", "int4", "k8v4"]))]
    width = data.draw(st.sampled_from([64, 128, 256]))
    call = replace(
        example_call(DEVICES["Hopper"], form), head_dim=width, value_head_dim=width,
        q_heads=data.draw(st.sampled_from([8, 32, 40])), kv_heads=8,
    )  # fmt: skip
    most, tokens = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    pieces, counters = needed(call, 132, most, tokens)
    # Asking for the most is the expensive half: eight steps for each.
    for _ in range(8):
        new = data.draw(st.integers(1, min(16, tokens)))
        requests = data.draw(st.integers(1, min(most, tokens)))
        contexts = data.draw(st.integers(1, 10**6))
        rows, tiles_of_rows = row_tiles(call.group, new)
        all_rows = requests * 8 * tiles_of_rows
        tiles = decode_tiles(
            form.key, form.value, width, rows, 8 * requests * contexts, all_rows,
            data.draw(st.booleans()), data.draw(st.booleans()),
        )  # fmt: skip
        rows, tiles_of_rows = row_tiles(call.group, new, *tiles.rows)
        all_rows = requests * 8 * tiles_of_rows
        programs = programs_of(tiles, 132, all_rows)
        asked = piece_sizes(programs, rows, width, all_rows, form.exact_pages is not None)
        assert all(a <= b for a, b in zip(asked, pieces, strict=True))
        assert counter_count(programs, all_rows, tiles.gather) <= counters


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_step_over_latent_rows_asks_for_more(data):
    form = FORMATS[data.draw(st.sampled_from(["none", "int8"]))]
    device = data.draw(st.sampled_from([DEVICES["Hopper"], DEVICES["Ampere"]]))
    heads = data.draw(st.sampled_from([6, 16, 128]))
    call = replace(
        example_call(device, form), q_heads=heads, kv_heads=1, head_dim=512, value_head_dim=64,
        latent=True,
    )  # fmt: skip
    most, tokens = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 200))
    held = latent_needed(call, 132, most, tokens)
    for _ in range(8):
        new = data.draw(st.integers(1, min(16, tokens)))
        requests = data.draw(st.integers(1, min(most, tokens)))
        keys = requests * data.draw(st.integers(1, 10**6))
        hopper = device is DEVICES["Hopper"] and form.key.quantized and data.draw(st.booleans())
        shape = latent.latent_tiles(
            form.key.quantized, heads * new, keys, device.capability, hopper
        )
        tiles = latent.fitted(shape, 576, 1 if form.key.quantized else 2, 99 * 1024)
        for each in (shape, tiles):
            all_rows = requests * latent.row_tiles(heads, new, each.rows)
            programs = latent.programs_of(each, 132, all_rows)
            asked = piece_sizes(programs, each.rows, 512, all_rows)
            assert all(a <= b for a, b in zip(asked, held, strict=True))


@pytest.fixture
def nothing_held(monkeypatch):
    monkeypatch.setattr(workspaces, "_workspaces", {})
    monkeypatch.setattr(workspaces, "_counters", {})


@pytest.mark.usefixtures("nothing_held")
def test_what_is_held_serves_the_step():
    call, cpu = example_call(DEVICES["CPU"], FORMATS["int8"]), torch.device("cpu")
    assert reserve(call, cpu, 4, 16) > 0
    before = [each.data_ptr() for each in workspace(cpu, (1, 1, 1))]
    pieces, _ = needed(call, 3, 4, 16)
    assert [each.data_ptr() for each in workspace(cpu, pieces)] == before


@pytest.mark.usefixtures("nothing_held")
def test_an_attention_reserves_by_who_serves_it():
    call = example_call(DEVICES["CPU"], FORMATS["int8"])
    attention = build_attention(find_backend("flash"), CausalMask(), call, "torch")
    assert attention.reserve(8, 64) == 0
    with pytest.raises(ValueError, match="max_requests: expected at least 1, got 0"):
        attention.reserve(0, 64)
    hopper = build_attention(
        find_backend("flash"), CausalMask(), replace(call, device=DEVICES["Hopper"])
    )
    # The interpreter's memory, as there is no such device here.
    assert hopper.reserve(2, 4, "cpu") == reserve(hopper.call, torch.device("cpu"), 2, 4) > 0


@pytest.mark.usefixtures("nothing_held")
def test_latent_rows_are_reserved_for_by_their_own():
    call = replace(
        example_call(DEVICES["Hopper"], FORMATS["int8"]), q_heads=128, kv_heads=1, head_dim=512,
        value_head_dim=64, latent=True,
    )  # fmt: skip
    attention = build_attention(find_backend("flash"), CausalMask(), call)
    assert (attention.prefill.name, attention.decode.name) == ("gluon", "gluon")
    # Two pieces of 64 rows of 512 a program, of which the interpreter has three.
    assert attention.reserve(2, 4, "cpu") >= 4 * 2 * 3 * 64 * 512
