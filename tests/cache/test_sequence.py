"""Pools and sequences under random use: nothing leaks, nothing is shared that is written."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantpage.cache import PageCopy, PagePool, Sequence
from quantpage.errors import CacheError, OutOfPages
from quantpage.formats.spec import ExactPages

pytestmark = pytest.mark.pure
PAGE = 4


class Sequences(RuleBasedStateMachine):
    """Requests that grow, fork, roll back and end; pages carry what was written to them."""

    def __init__(self):
        super().__init__()
        self.pool, self.exact_pool = PagePool(24), PagePool(16)
        self.requests: list[tuple[Sequence, list[int]]] = []
        self.written: dict[tuple[bool, int, int], int] = {}
        self.fresh = 0

    @precondition(lambda self: len(self.requests) < 4)
    @rule(exact=st.booleans())
    def start(self, exact):
        made = Sequence(self.pool, PAGE, self.exact_pool if exact else None)
        self.requests.append((made, []))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(0, 19), rejected=st.integers(0, 19))
    def step(self, data, tokens, rejected):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        before = (sequence.length, list(sequence.pages), list(sequence.exact_pages))
        try:
            copies = sequence.reserve(tokens)
        except OutOfPages:
            after = (sequence.length, list(sequence.pages), list(sequence.exact_pages))
            assert after == before, "a failed reservation changes nothing"
            return
        for copy in copies:
            for offset in range(PAGE):
                source = (copy.exact, copy.source, offset)
                if source in self.written:
                    self.written[copy.exact, copy.target, offset] = self.written[source]
        if tokens and sequence.exact_pages:
            before_first = max(sequence.length // PAGE - 1, 0)
            assert min(sequence.exact_pages[before_first:]) >= 0, "queries see these pages exactly"
        for position in range(sequence.length, sequence.length + tokens):
            self.fresh += 1
            contents.append(self.fresh)
            for exact, pages in ((False, sequence.pages), (True, sequence.exact_pages)):
                if pages:
                    page = pages[position // PAGE]
                    assert page >= 0, "a page that a new token stands in is kept exact"
                    pool = self.exact_pool if exact else self.pool
                    assert pool.references(page) == 1, "never write into a shared page"
                    self.written[exact, page, position % PAGE] = self.fresh
        accepted = max(tokens - rejected, 0)
        del contents[sequence.length + accepted :]
        sequence.commit(accepted)

    @precondition(lambda self: 0 < len(self.requests) < 5)
    @rule(data=st.data())
    def fork(self, data):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        self.requests.append((sequence.fork(), list(contents)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def roll_back(self, data):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        length = data.draw(st.integers(0, sequence.length))
        try:
            sequence.crop(length)
        except CacheError:
            assert sequence.length - length > PAGE, "a draft of a page can be rolled back"
            next_sees = sequence.exact_pages[max(length // PAGE - 1, 0) : -(-length // PAGE)]
            assert -1 in next_sees
            return
        del contents[length:]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.requests) - 1))
        self.requests.pop(index)[0].free()

    @invariant()
    def every_request_reads_its_own_tokens(self):
        for sequence, contents in self.requests:
            assert sequence.length == len(contents)
            for position, token in enumerate(contents):
                page = sequence.pages[position // PAGE]
                assert self.written[False, page, position % PAGE] == token
                if sequence.exact_pages and sequence.exact_pages[position // PAGE] >= 0:
                    page = sequence.exact_pages[position // PAGE]
                    assert self.written[True, page, position % PAGE] == token

    @invariant()
    def pools_agree_with_requests(self):
        for pool, name in ((self.pool, "pages"), (self.exact_pool, "exact_pages")):
            pool.check()
            held = [page for s, _ in self.requests for page in getattr(s, name) if page >= 0]
            assert pool.used == len(set(held))
            for page in set(held):
                assert pool.references(page) == held.count(page)

    @invariant()
    def exact_pages_stay_few(self):
        for sequence, _ in self.requests:
            kept = ExactPages().kept_pages
            assert sum(page >= 0 for page in sequence.exact_pages) <= kept


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_a_shared_last_page_is_copied_on_write():
    pool = PagePool(8)
    first = Sequence(pool, PAGE)
    first.reserve(6)
    first.commit()
    second = first.fork()
    assert second.reserve(1) == [PageCopy(first.pages[1], second.pages[1])]
    assert first.pages[0] == second.pages[0] and first.pages[1] != second.pages[1]
    assert first.reserve(1) == [], "the other one owns its page alone now"


def test_rolling_back_too_far_is_an_error_for_exact_pages():
    sequence = Sequence(PagePool(8), PAGE, PagePool(8))
    sequence.reserve(18)
    sequence.commit()
    for length, missing in ((6, 1), (11, 1), (8, 1)):
        with pytest.raises(CacheError, match=f"got {length}, for which page {missing} is not"):
            sequence.crop(length)
    sequence.crop(13)
    assert sequence.length == 13
    sequence.crop(12)
    with pytest.raises(CacheError, match="got 11, for which page 1 is not"):
        sequence.crop(11)
    sequence.crop(3)
    assert sequence.length == 3, "the first page is always there"


def test_misuse_is_an_error():
    pool = PagePool(2)
    with pytest.raises(CacheError, match="expected one that is held, got 1"):
        pool.release(1)
    sequence = Sequence(pool, PAGE)
    sequence.reserve(3)
    for act in (sequence.fork, lambda: sequence.crop(0), lambda: sequence.reserve(1)):
        with pytest.raises(CacheError, match="committed first"):
            act()
    sequence.commit()
    with pytest.raises(OutOfPages, match="got 1 of 2"):
        sequence.reserve(12)


def test_what_fits_exactly_fits():
    pool, exact_pool = PagePool(7), PagePool(7)
    sequence = Sequence(pool, PAGE, exact_pool)
    sequence.reserve(26)
    sequence.commit()
    assert (pool.free, sequence.pages_needed(2)) == (0, (0, 0))
    assert sequence.reserve(2) == [], "the page in progress has room"
    sequence.commit()
    with pytest.raises(OutOfPages, match="expected 1 free pages, got 0 of 7"):
        sequence.reserve(1)


def test_it_is_said_which_pool_is_out():
    sequence = Sequence(PagePool(8), PAGE, PagePool(2))
    with pytest.raises(OutOfPages, match=r"^exact_pool: expected 3 free pages, got 2 of 2"):
        sequence.reserve(9)
    assert sequence.pages == []


def test_a_fork_needs_a_page_for_its_copy():
    pool = PagePool(2)
    sequence = Sequence(pool, PAGE)
    sequence.reserve(6)
    sequence.commit()
    other = sequence.fork()
    assert other.pages_needed(1) == (1, 0)
    with pytest.raises(OutOfPages):
        other.reserve(1)
    other.free()
    assert sequence.reserve(1) == []


def test_a_long_draft_is_rejected_when_the_step_ends():
    sequence = Sequence(PagePool(16), PAGE, PagePool(16))
    sequence.reserve(18)
    sequence.commit()
    sequence.reserve(40)
    with pytest.raises(ValueError, match=r"tokens: expected 0..40, got 41"):
        sequence.commit(41)
    sequence.commit(1)
    assert (sequence.length, len(sequence.pages)) == (19, 5)
    assert min(sequence.exact_pages[3:]) >= 0, "what the next query sees exactly is there"
