"""Files of pages that somebody made on purpose, or that were damaged: an error and nothing."""

import json
import random

import pytest
import torch

from quantpage.cache import PagedKVCache
from quantpage.errors import CorruptCache
from tests.cache.forging import Forged, filled, planes

pytestmark = pytest.mark.cpu


@pytest.fixture
def forged(tmp_path):
    filled(pages=2, exact_pages=1).save(tmp_path / "pages", note={"tokens": [1]})
    return Forged(tmp_path / "pages")


BAD = [-1, 0, 1, 3, 2**31, 2**70, 10**30, 1.5, True, None, "int8", "load", [], [1], {}, {"a": 1}]


def test_forged_headers_give_nothing(forged):
    """Every field of a tensor, each with what it cannot be; the checksum is as asked."""
    for name in list(forged.header):
        if name == "__metadata__":
            continue
        for field, at in [
            ("dtype", None),
            ("shape", None),
            ("data_offsets", None),
            (None, None),
        ] + [(field, at) for field in ("shape", "data_offsets") for at in (0, 1)]:
            for bad in [*BAD, "F64", "F8_E4M3", [0, 0], [2**40] * 3]:
                with forged.edited() as header:
                    if field is None:
                        header[name] = bad
                    elif at is None:
                        header[name][field] = bad
                    else:
                        header[name][field][at] = bad
                    unchanged = same(header, forged.header)
                refused(forged, unchanged)


def test_forged_descriptions_give_nothing(forged):
    """Every value in the metadata, deep down, with a checksum that is right."""
    for name in ("layouts", "counts", "note"):
        given = json.loads(forged.header["__metadata__"][name])
        for path in forged.paths(given):
            if path[:1] == ["user"]:
                continue
            for bad in BAD:
                edited = forged.put(given, path, bad)
                forged.describe(name, json.dumps(edited))
                refused(forged, same(edited, given))
            forged.describe(name, json.dumps(forged.drop(given, path)))
            refused(forged)
            forged.describe(name, json.dumps(forged.put(given, [*path[:-1], "more"], 1)))
            refused(forged, path[:-1] == [] and isinstance(given, list))
        if name == "note":
            forged.describe(name, json.dumps({**given, "user": [1]}))
            refused(forged)
        for text in ("", "[]", "1", "{", "NaN", "[" * 100_000, '{"a": 1, "a": 1}', "\ud800"):
            forged.describe(name, text)
            refused(forged)


def same(one, other):
    """As JSON: True is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def refused(forged, unchanged=False):
    """CorruptCache in one sentence; a file whose values are the old ones is the old file.

    Names of formats are free, and so are codes' zero points where no plane tells.
    """
    try:
        loaded, note = PagedKVCache.load(forged.path)
    except CorruptCache as error:
        assert not unchanged, error
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    if unchanged:
        assert loaded.layouts == forged.layouts
    assert note == {"tokens": [1]} and (loaded.pages, loaded.exact_pages) == (2, 1)
    for index, layout in loaded.layouts.items():
        # What the planes hold decides: what differs cannot be told by any shape.
        assert [each.shape for each in planes(loaded, index)] == forged.shapes[index], layout


@pytest.mark.parametrize("kept", [1, 5])
def test_how_many_exact_pages_are_kept_is_no_setting(tmp_path, kept):
    filled("int8_exact").save(tmp_path / "pages")
    forged = Forged(tmp_path / "pages")
    layouts = json.loads(forged.header["__metadata__"]["layouts"])
    assert layouts["0"]["exact_pages"] == 4
    layouts["0"]["exact_pages"] = kept
    forged.describe("layouts", json.dumps(layouts))
    with pytest.raises(CorruptCache, match=f"exact_pages: expected 4 or null, got {kept}"):
        PagedKVCache.load(forged.path)


def test_forged_planes_come_and_go(forged):
    names = [name for name in forged.header if name != "__metadata__"]
    for name in names:
        forged.without(name)
        with pytest.raises(CorruptCache, match="missing and"):
            PagedKVCache.load(forged.path)
    forged.with_plane("0.key_map.mean", torch.zeros(2, 32))
    with pytest.raises(CorruptCache, match="besides them"):
        PagedKVCache.load(forged.path)
    for bad in (torch.zeros(2, 32), torch.full((2, 32), torch.nan), torch.ones(3, 32)):
        forged.with_plane("0.key_map.scale", bad)
        with pytest.raises(CorruptCache, match=r"key.map"):
            PagedKVCache.load(forged.path)
    forged.with_plane("0.key_map.scale", torch.ones(2, 32))
    assert PagedKVCache.load(forged.path)[0].layer(0).key_map is not None


def test_random_damage_is_found(forged):
    """Bytes flipped, taken out, put in: CorruptCache, or the very same cache."""
    whole, draw = forged.path.read_bytes(), random.Random(7)
    for _ in range(400):
        made = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(1500 if draw.random() < 0.7 else len(made))
            act = draw.randrange(4)
            if act == 0:
                made[at] ^= 1 << draw.randrange(8)
            elif act == 1:
                del made[at : at + draw.randint(1, 40)]
            elif act == 2:
                made[at:at] = draw.randbytes(draw.randint(1, 9))
            else:
                made[at : at + 8] = draw.choice([b"\0" * 8, b"\xff" * 8, b"[[[[[[[[", b"99999999"])
        forged.path.write_bytes(made)
        try:
            loaded, note = PagedKVCache.load(forged.path)
        except CorruptCache:
            continue
        assert note == {"tokens": [1]} and loaded.layouts == forged.layouts
        for mine, theirs in zip(forged.planes, planes(loaded), strict=True):
            assert torch.equal(mine, theirs)


def test_every_byte_belongs_to_one_tensor(forged):
    names = [name for name in forged.header if name != "__metadata__"]
    with forged.edited() as header:
        header[names[-1]]["data_offsets"] = [each - 1 for each in header[names[-1]]["data_offsets"]]
    with pytest.raises(CorruptCache, match="expected tensors without gap or overlap"):
        PagedKVCache.load(forged.path)
    forged.describe("note", forged.metadata["note"])
    PagedKVCache.load(forged.path)
    with open(forged.path, "ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptCache, match="expected a whole safetensors file"):
        PagedKVCache.load(forged.path)


def test_a_name_twice_is_refused(forged):
    note = forged.metadata["note"]
    forged.describe("note", note.replace('"pages": 2', '"pages": 2, "pages": 2'))
    with pytest.raises(CorruptCache, match="the same name twice"):
        PagedKVCache.load(forged.path)
