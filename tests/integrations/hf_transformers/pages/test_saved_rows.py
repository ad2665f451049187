"""Files of a model's cache whose note is not what the cache wrote: refused, whatever it says."""

import json
from dataclasses import replace

import pytest
import torch

import quantpage
from quantpage.cache import PagedKVCache
from quantpage.cache.saved import write_pages
from quantpage.errors import CorruptCache
from tests.cache.forging import Forged
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu

PAGE = 16
BAD = [-2, -1, 0, 1, 2, 7, 2**31, 10**30, 1.5, True, None, "x", [], [0], [[]], {}, {"a": 1}]


@pytest.fixture(scope="module", params=["llama", "mistral_window"])
def model(request):
    return tiny(request.param)


@pytest.fixture
def attached(model):
    with quantpage.attach(model, "int4", page_size=PAGE) as made:
        yield made


@pytest.fixture
def forged(attached, tmp_path):
    """Two rows of 40 tokens, the second with 13 of padding, forked to three."""
    ids = tokens(2, 40).clamp(3, 127)
    padding = torch.ones_like(ids)
    padding[1, :13] = 0
    cache = attached.new_cache()
    attached.model(ids, attention_mask=padding, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 1, 1]))
    attached.save_cache(cache, tmp_path / "rows")
    return Forged(tmp_path / "rows")


def seen(attached, cache):
    """What one more token makes of it."""
    longer = torch.ones(3, 41, dtype=torch.long)
    longer[1:, :13] = 0
    ids = torch.full((3, 1), 5)
    return attached.model(ids, attention_mask=longer, past_key_values=cache).logits


def test_every_value_of_the_note(attached, forged):
    note = json.loads(forged.metadata["note"])
    wanted = seen(attached, attached.load_cache(forged.path))
    paths = [path for path in forged.paths(note) if path[0] != "model"]
    kept = [path for path in paths if path[0] == "kept" and len(path) == 3]
    # The mask is 3 x 40 numbers of one kind: a few stand for them.
    paths = [path for path in paths if path not in kept[3:]]
    refusals = 0
    for path in paths:
        for bad in BAD:
            shares = path[-2:-1] in (["pages"], ["exact_pages"])
            edited = forged.put(note, path, bad)
            refusals += check(attached, forged, edited, note, None if shares else wanted)
        refusals += check(attached, forged, forged.drop(note, path), note, wanted)
    assert refusals > 10 * len(paths)


def check(attached, forged, edited, note, wanted):
    """Whether it was refused; what was not is the same cache, or (wanted: None) one of the same
    pages in which another row is a fork."""
    forged.describe("note", json.dumps(edited))
    try:
        loaded = attached.load_cache(forged.path)
    except CorruptCache as error:
        assert json.dumps(edited) != json.dumps(note), error
        return True
    found = seen(attached, loaded)
    torch.testing.assert_close(found, found if wanted is None else wanted, atol=1e-9, rtol=0)
    assert found.isfinite().all()
    return False


def test_every_value_of_the_layouts(attached, forged):
    """Of one layer and of all: only the model's own load."""
    layouts = json.loads(forged.metadata["layouts"])
    for path in [path for path in forged.paths(layouts) if path[0] == "0"]:
        for bad in [*BAD, 16, 32, 64, 128, "float32", "float16", "int8", "int4", "none"]:
            for everywhere in (False, True):
                edited = layouts
                for layer in layouts if everywhere else ["0"]:
                    edited = forged.put(edited, [layer, *path[1:]], bad)
                # Values as wide as keys are said in two ways.
                if edited == layouts or (path[-1], bad) == ("value_head_dim", None):
                    continue
                forged.describe("layouts", json.dumps(edited))
                with pytest.raises(CorruptCache):
                    attached.load_cache(forged.path)


@pytest.mark.parametrize("field, other", [("kv_heads", 4), ("head_dim", 32), ("dtype", "bfloat16")])
def test_pages_of_another_shape_with_planes_to_match(attached, forged, field, other):
    """Whole files of a model that has other heads, under this one's name."""
    layouts = {
        index: replace(each, **{field: getattr(torch, other) if field == "dtype" else other})
        for index, each in forged.layouts.items()
    }
    cache = PagedKVCache(*next(iter(forged.saved.counts.values())))
    for index, layout in layouts.items():
        cache.add_layer(index, layout)
    held = list(range(cache.pages)), list(range(cache.exact_pages))
    write_pages(forged.path, replace(forged.saved, layouts=layouts, planes=cache.to_save(*held)))
    with pytest.raises(CorruptCache, match=f"layer 0, {field}: expected"):
        attached.load_cache(forged.path)


def test_pages_that_are_shared_and_swapped(attached, forged):
    note = json.loads(forged.metadata["note"])
    for name in ("pages", "exact_pages"):
        edited = json.loads(forged.metadata["note"])
        row = edited["tables"][0]["rows"][0][name]
        held = [at for at, page in enumerate(row) if page >= 0]
        row[held[0]] = row[held[-1]]
        forged.describe("note", json.dumps(edited))
        with pytest.raises(CorruptCache, match=f"{name}: expected page .* at one place"):
            attached.load_cache(forged.path)
    for name in ("length", "tables", "kept"):
        forged.describe("note", json.dumps({k: v for k, v in note.items() if k != name}))
        with pytest.raises(CorruptCache, match="expected the page tables of a cache"):
            attached.load_cache(forged.path)


def test_a_layer_is_missing(attached, forged):
    for name in ("layouts", "counts"):
        record = json.loads(forged.metadata[name])
        forged.metadata[name] = json.dumps({k: v for k, v in record.items() if k != "0"})
    planes = forged.saved.planes
    for name in [each for each in planes if each.startswith("0.")]:
        del planes[name]
    forged.without("nothing")
    with pytest.raises(CorruptCache, match=r"expected layers \[0, 1"):
        attached.load_cache(forged.path)


def test_a_page_that_a_query_sees_is_missing_in_one_fork(attached, forged):
    for name in ("pages", "exact_pages"):
        note = json.loads(forged.metadata["note"])
        # Row 2 still holds what row 1 lets go.
        note["tables"][0]["rows"][1][name][-1] = -1
        forged.describe("note", json.dumps(note))
        with pytest.raises(CorruptCache, match="whose last pages are still kept"):
            attached.load_cache(forged.path)
