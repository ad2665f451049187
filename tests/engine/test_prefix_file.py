"""Known prompts in a file: another engine finds what this one knew, bit for bit."""

import pytest
import torch

from quantpage.cache.saved import read_pages, write_pages
from quantpage.engine import Limits, Request, Sampling
from quantpage.engine.prefix_file import collect
from quantpage.errors import CorruptCache
from tests.engine.asked import Asked, ask_all, engine, leaked, requests
from tests.integrations.tiny_models import tiny

pytestmark = pytest.mark.cpu

KINDS = [
    ("llama", "none"),
    ("llama", "int8"),
    ("llama", "k8v4"),
    ("qwen2_bias", "int4"),
    ("gemma3_window", "int8"),
    ("gemma3_window", "int4"),
]


def known(engine):
    """All that an engine remembers, as a file would keep it."""
    saved = collect(engine._runner.memory, engine._scheduler.known, "")
    return saved.note, saved.planes


@pytest.mark.parametrize(("name", "kv_format"), KINDS)
def test_another_engine_knows_the_same_pages(name, kv_format, tmp_path):
    model = tiny(name, torch.float32)
    file, asked = tmp_path / "known.pages", requests(6, longest=90, made=40)
    with engine(kv_format, model=model) as first:
        wanted = ask_all(first, asked)
        pages = first.save_prefixes(file)
        before = known(first)
        # What a second asking would find.
        hits = [each.cached for each in ask_all(first, asked)]
    with engine(kv_format, model=model) as second:
        assert second.load_prefixes(file) == pages > 10
        after = known(second)
        assert before[0] == after[0]
        assert before[1].keys() == after[1].keys()
        assert all(torch.equal(each, after[1][name]) for name, each in before[1].items())
        got = ask_all(second, asked)
        for _, cache in second._scheduler.known.items():
            cache.check()
        assert leaked(second) == 0
    assert [each.texts for each in got] == [each.texts for each in wanted]
    assert [each.cached for each in got] == hits and min(hits) > 0


@pytest.mark.parametrize(("name", "kv_format"), [("llama", "int8"), ("gemma3_window", "int4")])
def test_a_smaller_pool_takes_the_latest(name, kv_format, tmp_path):
    model = tiny(name, torch.float32)
    file, asked = tmp_path / "known.pages", requests(6, longest=90, made=40)
    with engine(kv_format, model=model) as first:
        wanted = ask_all(first, asked)
        Asked(first, asked[1]).wait()
        first.save_prefixes(file)
    limits = Limits(pages=18, max_running=2, step_tokens=64)
    with engine(kv_format, limits, model) as small:
        assert small.load_prefixes(file) == 18
        latest = Asked(small, asked[1]).wait()
        assert latest.cached > 0 and latest.texts == wanted[1].texts
        assert [each.texts for each in ask_all(small, asked)] == [each.texts for each in wanted]
        assert leaked(small) == 0


def test_what_is_loaded_joins_what_is_known(tmp_path):
    model = tiny("llama", torch.float32)
    file, (first, second) = tmp_path / "known.pages", requests(3)[1:]
    with engine(model=model) as one:
        wanted = Asked(one, first).wait().texts
        one.save_prefixes(file)
    with engine(model=model) as two:
        other = Asked(two, second).wait()
        for _ in range(2):
            two.load_prefixes(file)
        hit, again = Asked(two, first).wait(), Asked(two, second).wait()
        assert hit.cached > 0 and hit.texts == wanted
        assert again.cached > 0 and again.texts == other.texts
        assert leaked(two) == 0


def test_saving_disturbs_no_answer_and_works_after_the_end(tmp_path):
    long = Request(tuple(range(3, 60)), 300, Sampling(temperature=0))
    with engine() as alone:
        wanted = Asked(alone, long).wait().texts
    with engine() as one:
        asked = Asked(one, long)
        counts = [one.save_prefixes(tmp_path / "while.pages") for _ in range(5)]
        assert asked.wait().texts == wanted
        one.stop()
        assert one.save_prefixes(tmp_path / "after.pages") >= max(counts)
    with engine() as two:
        two.load_prefixes(tmp_path / "after.pages")
        assert Asked(two, long).wait().cached > 0
    with engine(prefix_cache=False) as none, pytest.raises(ValueError, match="remembers prompts"):
        none.save_prefixes(tmp_path / "none.pages")


def altered(path, change):
    """The same file with another note or other planes, and a checksum that is right."""
    saved = read_pages(path)
    change(saved)
    write_pages(path, saved)


def page(saved, at=0):
    return saved.note["prefixes"][0]["pages"][at]


FORGED = {
    "another model": lambda saved: saved.note.update(model="x"),
    "no prompts": lambda saved: saved.note.pop("prefixes"),
    "a page twice": lambda saved: page(saved, 1).__setitem__(1, 0),
    "a page that is none": lambda saved: page(saved).__setitem__(1, 10**6),
    "a page that is no number": lambda saved: page(saved).__setitem__(1, False),
    "a page that follows itself": lambda saved: page(saved).__setitem__(0, 0),
    "a page that follows a later one": lambda saved: page(saved).__setitem__(0, 3),
    "a page of too few tokens": lambda saved: page(saved).pop(),
    "a token that is none": lambda saved: page(saved).__setitem__(4, "x"),
    "a page that nobody mentions": lambda saved: saved.note["prefixes"][0]["pages"].pop(),
    "layers of others": lambda saved: saved.note["prefixes"][0]["layers"].pop(),
    "a reach of others": lambda saved: saved.note["prefixes"][0].update(reach=[7, 0]),
    "a reach twice": lambda saved: saved.note["prefixes"].append(saved.note["prefixes"][0]),
    "no reach": lambda saved: saved.note["prefixes"].clear(),
    "another calibration": lambda saved: saved.planes["0.key_map.scale"].mul_(2),
    "no calibration": lambda saved: [
        saved.planes.pop(name) for name in list(saved.planes) if name.startswith("1.key_map")
    ],
}


@pytest.mark.parametrize("what", FORGED)
def test_a_file_that_cannot_be_changes_nothing(what, tmp_path):
    model, file = tiny("qwen2_bias", torch.float32), tmp_path / "known.pages"
    asked = requests(2)[1]
    with engine("int4", model=model) as one:
        wanted = Asked(one, asked).wait().texts
        one.save_prefixes(file)
    altered(file, FORGED[what])
    with engine("int4", model=model) as two:
        with pytest.raises(CorruptCache, match=r"known\.pages: "):
            two.load_prefixes(file)
        assert two.stats().used_pages == 0
        got = Asked(two, asked).wait()
        assert (got.texts, got.cached) == (wanted, 0)


def test_other_formats_and_damage_are_refused(tmp_path):
    file = tmp_path / "known.pages"
    with engine("int8") as one:
        Asked(one, requests(2)[1]).wait()
        one.save_prefixes(file)
    with engine("int4") as two, pytest.raises(CorruptCache, match="layer 0, format: expected int4"):
        two.load_prefixes(file)
    file.write_bytes(file.read_bytes()[:-1])
    with engine("int8") as two:
        with pytest.raises(CorruptCache, match="expected a whole"):
            two.load_prefixes(file)
        with pytest.raises(FileNotFoundError):
            two.load_prefixes(tmp_path / "nowhere")
