"""The prefix cache under random use: a hit is the same tokens, nothing leaks, LRU pages go."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantpage.cache import CacheLayout, PagePool, PrefixCache, Sequence, prefix_seed
from quantpage.cache import prefix as prefix_module
from quantpage.errors import CacheError, OutOfPages
from quantpage.formats import FORMATS

pytestmark = pytest.mark.pure
PAGE = 4
# Few tokens, so that prompts share beginnings by chance.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=15)


class Prompts(RuleBasedStateMachine):
    """Prompts come, reuse what is known, are remembered and end; eviction when pages run out."""

    def __init__(self):
        super().__init__()
        self.pool, self.exact_pool = PagePool(20), PagePool(20)
        self.cache = PrefixCache(self.pool, PAGE, b"seed", self.exact_pool)
        self.requests: list[tuple[Sequence, list[int]]] = []
        self.written: dict[int, tuple[int, ...]] = {}
        self.written_exact: dict[int, tuple[int, ...]] = {}

    @precondition(lambda self: len(self.requests) < 4)
    @rule(tokens=PROMPTS, remember=st.booleans())
    def prompt(self, tokens, remember):
        sequence = Sequence(self.pool, PAGE, self.exact_pool)
        sequence.adopt(self.cache.acquire(tokens[:-1]))
        for index, page in enumerate(sequence.pages):
            assert self.written[page] == tuple(tokens[: (index + 1) * PAGE]), "not these tokens"
            if (exact := sequence.exact_pages[index]) >= 0:
                assert self.written_exact[exact] == self.written[page]
        rest = len(tokens) - sequence.length
        need, _ = sequence.pages_needed(rest)
        if need > self.pool.free:
            self.cache.evict(need - self.pool.free)
        try:
            assert sequence.reserve(rest) == [], "a hit ends on a page border"
        except OutOfPages:
            sequence.free()
            return
        sequence.commit()
        self.requests.append((sequence, tokens))
        for index, page in enumerate(sequence.pages):
            self.written[page] = tuple(tokens[: (index + 1) * PAGE])
            if (exact := sequence.exact_pages[index]) >= 0:
                self.written_exact[exact] = self.written[page]
        if remember:
            self.cache.insert(tokens, sequence)
            assert len(self.cache.find(tokens).pages) == len(tokens) // PAGE

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.requests) - 1))
        self.requests.pop(index)[0].free()

    @rule(pages=st.integers(0, 5))
    def evict(self, pages):
        before = self.pool.free
        freed = self.cache.evict(pages)
        assert self.pool.free == before + freed

    @rule(pages=st.integers(0, 3))
    def evict_exact(self, pages):
        before = self.exact_pool.free
        freed = self.cache.evict_exact(pages)
        assert self.exact_pool.free == before + freed

    @invariant()
    def everything_agrees(self):
        self.pool.check()
        self.exact_pool.check()
        self.cache.check()
        used = {page for sequence, _ in self.requests for page in sequence.pages}
        held = {entry.page for entry in self.cache._entries.values()}
        assert self.pool.used == len(used | held)
        entries = self.cache._entries.values()
        used = {page for sequence, _ in self.requests for page in sequence.exact_pages}
        held = {entry.exact_page for entry in entries}
        assert self.exact_pool.used == len((used | held) - {-1})

    def teardown(self):
        self.cache.clear()
        for sequence, _ in self.requests:
            sequence.free()
        assert self.pool.used == self.exact_pool.used == 0, "a page leaked"


TestPrompts = Prompts.TestCase
TestPrompts.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


def filled(pool, tokens, exact_pool=None):
    sequence = Sequence(pool, PAGE, exact_pool)
    sequence.reserve(len(tokens))
    sequence.commit()
    return sequence


def test_only_full_pages_of_the_same_beginning_are_found():
    pool = PagePool(16)
    cache = PrefixCache(pool, PAGE, b"seed")
    first = filled(pool, range(10))
    assert cache.insert(range(10), first) == 2
    assert cache.find(range(10)).pages == tuple(first.pages[:2])
    assert cache.find(range(7)).pages == tuple(first.pages[:1])
    assert cache.find([*range(4), 9, 9, 9, 9]).pages == tuple(first.pages[:1])
    assert cache.find([4, 5, 6, 7]).pages == (), "the same tokens after another beginning"
    assert cache.insert(range(10), first) == 0, "known already"


def test_finding_changes_nothing_and_acquiring_holds():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed")
    first = filled(pool, range(8))
    cache.insert(range(8), first)
    first.free()
    page = cache.find(range(8)).pages[0]
    assert pool.references(page) == 1
    second = Sequence(pool, PAGE)
    second.adopt(cache.acquire(range(8)))
    assert (pool.references(page), second.length) == (2, 8)
    assert cache.evict(8) == 0, "somebody still reads them"


def test_a_collision_is_a_miss(monkeypatch):
    monkeypatch.setattr(prefix_module, "_chained", lambda parent, tokens: b"same")
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed")
    first, second = filled(pool, range(4)), filled(pool, range(4, 8))
    cache.insert(range(4), first)
    assert cache.insert(range(4, 8), second) == 0
    assert cache.find(range(4, 8)).pages == ()
    assert cache.find(range(4)).pages == tuple(first.pages)
    cache.check()


def test_the_least_recently_used_prompt_goes_first():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed")
    for start in (0, 100, 200):
        sequence = filled(pool, range(start, start + 8))
        cache.insert(range(start, start + 8), sequence)
        sequence.free()
    reader = Sequence(pool, PAGE)
    reader.adopt(cache.acquire(range(8)))
    reader.free()
    assert cache.evict(3) == 3
    assert len(cache.find(range(8)).pages) == 2
    assert len(cache.find(range(100, 108)).pages) == 0
    assert len(cache.find(range(200, 208)).pages) == 1, "its last page goes first"


def test_writing_after_a_rollback_leaves_the_remembered_page():
    pool, exact_pool = PagePool(8), PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed", exact_pool)
    sequence = filled(pool, range(8), exact_pool)
    cache.insert(range(8), sequence)
    sequence.crop(6)
    (copy,) = [each for each in sequence.reserve(1) if not each.exact]
    assert copy.source == cache.find(range(8)).pages[1] != sequence.pages[1]


def test_the_first_and_last_page_stay_exact_for_a_reader():
    pool, exact_pool = PagePool(8), PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed", exact_pool)
    first = filled(pool, range(12), exact_pool)
    cache.insert(range(12), first)
    ends = first.exact_pages[0], first.exact_pages[2]
    first.free()
    second = Sequence(pool, PAGE, exact_pool)
    second.adopt(cache.acquire(range(12)))
    assert second.exact_pages == [ends[0], -1, ends[1]]
    second.reserve(1)
    assert second.exact_pages[3] >= 0
    with pytest.raises(CacheError, match="adopt: expected an empty sequence"):
        second.adopt(cache.find(range(12)))


def test_a_hit_ends_where_a_page_is_exact():
    pool, exact_pool = PagePool(32), PagePool(32)
    cache = PrefixCache(pool, PAGE, b"seed", exact_pool)
    prompt = range(6 * PAGE)
    cache.insert(prompt, filled(pool, prompt, exact_pool))

    def hits():
        return [len(cache.find(prompt[: pages * PAGE]).pages) for pages in range(1, 7)]

    assert hits() == [1, 1, 1, 1, 5, 6], "the donor has let go of pages 1 to 3"
    cache.insert(prompt[: 3 * PAGE], filled(pool, prompt[: 3 * PAGE], exact_pool))
    assert hits() == [1, 2, 3, 3, 5, 6], "remembered pages become exact later, too"
    cache.check()


def test_exact_pages_go_alone():
    pool, exact_pool = PagePool(8), PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed", exact_pool)
    donor = filled(pool, range(3 * PAGE), exact_pool)
    cache.insert(range(3 * PAGE), donor)
    assert cache.evict_exact(1) == 0, "the donor still reads them"
    donor.free()
    assert (cache.evict_exact(1), exact_pool.used, len(cache)) == (1, 2, 3)
    assert len(cache.find(range(3 * PAGE)).pages) == 2, "the last of the prompt went first"
    assert PrefixCache(pool, PAGE, b"seed").evict_exact(1) == 0


def test_the_seed_knows_model_formats_and_scales():
    def seed(model="a", name="int8", page_size=64, scales=b""):
        return prefix_seed(model, {0: CacheLayout(2, 64, FORMATS[name], page_size)}, scales)

    seeds = {seed(), seed(model="b"), seed(name="int4"), seed(page_size=16), seed(scales=b"x")}
    assert len(seeds) == 5 and seed() == seed()


def test_a_page_goes_only_after_those_that_follow_it():
    # Two requests computed the same first page at once; the second one's own tail follows the
    # first one's page, which nobody but the cache holds any more.
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE, b"seed")
    first, second = filled(pool, range(4)), filled(pool, range(8))
    cache.insert(range(4), first)
    cache.insert(range(8), second)
    first.free()
    assert cache.evict(8) == 0
    cache.check()
    assert len(cache.find(range(8)).pages) == 2
    second.free()
    assert cache.evict(8) == 2 and pool.used == 0
