"""Pools and sequences under random use: nothing leaks, nothing is shared that is written."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantpage.cache import PageCopy, PagePool, Reach, Sequence
from quantpage.cache.reach import ROLLBACK
from quantpage.errors import CacheError, OutOfPages
from quantpage.formats.spec import ExactPages

pytestmark = pytest.mark.pure
PAGE = 4


def visible_pages(reach, query, tokens, exact):
    """Pages that some query from ``query`` on sees, of so many tokens; from the rules themselves:
    every key of every query up to two pages on, and the page that the next token is written to."""
    pages = {tokens // PAGE} if tokens % PAGE else set()
    for at in range(query, max(query + 2 * PAGE, tokens)):
        for key in range(min(at + 1, tokens)):
            inside = key > at - reach.window if reach.window else True
            inside &= key // reach.chunk == at // reach.chunk if reach.chunk else True
            near = key // PAGE == 0 or 0 <= at // PAGE - key // PAGE <= 1
            if inside and (near or not exact):
                pages.add(key // PAGE)
    return pages


class Sequences(RuleBasedStateMachine):
    """Requests that grow, fork, roll back and end; pages carry what was written to them."""

    def __init__(self):
        super().__init__()
        self.pool, self.exact_pool = PagePool(24), PagePool(16)
        self.requests: list[tuple[Sequence, list[int]]] = []
        self.written: dict[tuple[bool, int, int], int] = {}
        self.fresh = 0
        # Of each request: the length that a rollback may reach for sure.
        self.sure: dict[Sequence, int] = {}

    @precondition(lambda self: len(self.requests) < 4)
    @rule(
        exact=st.booleans(),
        reach=st.one_of(
            st.builds(Reach, window=st.integers(0, 20)), st.builds(Reach, chunk=st.integers(1, 20))
        ),
    )
    def start(self, exact, reach):
        made = Sequence(self.pool, PAGE, self.exact_pool if exact else None, reach)
        self.requests.append((made, []))
        self.sure[made] = 0

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        tokens=st.one_of(st.integers(0, 19), st.integers(0, 150)),
        rejected=st.one_of(st.integers(0, 19), st.integers(0, ROLLBACK + 20)),
        sparse=st.booleans(),
    )
    def step(self, data, tokens, rejected, sparse):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        before = (sequence.length, list(sequence.pages), list(sequence.exact_pages))
        need = sequence.pages_needed(tokens, sparse)
        free = self.pool.free, self.exact_pool.free
        try:
            copies = sequence.reserve(tokens, sparse)
        except OutOfPages:
            assert need[0] > free[0] or need[1] > free[1]
            after = (sequence.length, list(sequence.pages), list(sequence.exact_pages))
            assert after == before, "a failed reservation changes nothing"
            return
        taken = (free[0] - self.pool.free, free[1] - self.exact_pool.free)
        assert taken == need, "what was asked for is what is taken"
        for copy in copies:
            for offset in range(PAGE):
                source = (copy.exact, copy.source, offset)
                if source in self.written:
                    self.written[copy.exact, copy.target, offset] = self.written[source]
        end = sequence.length + tokens
        for exact, pages in ((False, sequence.pages), (True, sequence.exact_pages)):
            if tokens and pages and not sparse:
                seen = visible_pages(sequence.reach, sequence.length, end, exact)
                assert all(pages[page] >= 0 for page in seen), "the step's queries see these"
        for position in range(sequence.length, end):
            self.fresh += 1
            contents.append(self.fresh)
            for exact, pages in ((False, sequence.pages), (True, sequence.exact_pages)):
                page = pages[position // PAGE] if pages else -1
                if page >= 0:
                    pool = self.exact_pool if exact else self.pool
                    assert pool.references(page) == 1, "never write into a shared page"
                    self.written[exact, page, position % PAGE] = self.fresh
        start, accepted = sequence.length, max(tokens - rejected, 0)
        try:
            sequence.commit(accepted)
        except CacheError:
            assert sparse and tokens - accepted > ROLLBACK
            sequence.cancel()
            accepted = 0
        del contents[start + accepted :]
        # Once the request was that long, what is behind is let go.
        self.sure[sequence] = max(self.sure[sequence], sequence.length - PAGE)
        if sparse and accepted and end - ROLLBACK > start:
            self.sure[sequence] = max(self.sure[sequence], min(end - ROLLBACK, sequence.length))

    @precondition(lambda self: 0 < len(self.requests) < 5)
    @rule(data=st.data())
    def fork(self, data):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        made = sequence.fork()
        self.requests.append((made, list(contents)))
        self.sure[made] = self.sure[sequence]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def roll_back(self, data):
        sequence, contents = data.draw(st.sampled_from(self.requests))
        length = data.draw(st.integers(0, sequence.length))
        try:
            sequence.crop(length)
        except CacheError:
            assert length < self.sure[sequence], "so far back it is promised"
            assert any(
                pages and pages[page] < 0
                for exact, pages in ((False, sequence.pages), (True, sequence.exact_pages))
                for page in visible_pages(sequence.reach, length, length, exact)
            )
            return
        self.sure[sequence] = min(self.sure[sequence], length)
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
            for exact, pages in ((False, sequence.pages), (True, sequence.exact_pages)):
                seen = visible_pages(sequence.reach, len(contents), len(contents), exact)
                assert not pages or all(pages[page] >= 0 for page in seen)
            for position, token in enumerate(contents):
                page = sequence.pages[position // PAGE]
                assert page < 0 or self.written[False, page, position % PAGE] == token
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
    def few_pages_are_kept(self):
        for sequence, _ in self.requests:
            kept = ExactPages().kept_pages
            assert sum(page >= 0 for page in sequence.exact_pages) <= kept
            if sequence.reach.limited:
                limit = sequence.reach.window + sequence.reach.chunk
                # A page to roll back, and two that are partly seen.
                assert sum(page >= 0 for page in sequence.pages) <= -(-limit // PAGE) + 2


TestSequences = Sequences.TestCase
# More by hand: max_examples=6000 takes eight minutes.
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


@pytest.mark.parametrize("reach", [Reach(), Reach(window=9), Reach(window=3), Reach(chunk=8)])
def test_a_sparse_step_takes_what_is_read_after_it(reach):
    whole, sparse = (Sequence(PagePool(64), PAGE, PagePool(64), reach) for _ in range(2))
    for tokens in (5, 3, 150, 1, 80, 1):
        whole.reserve(tokens)
        sparse.reserve(tokens, sparse=True)
        held = [sum(page >= 0 for page in each.exact_pages) for each in (whole, sparse)]
        if tokens > 100:
            # 64 tokens may be rejected: 17 pages, the one before them, and two of before the step.
            assert held[1] <= 20 < held[0]
        for each in (whole, sparse):
            each.commit()
        for name in ("pages", "exact_pages"):
            kept = [[page >= 0 for page in getattr(each, name)] for each in (whole, sparse)]
            assert kept[0] == kept[1], "afterwards the same is there"


def test_rolling_back_out_of_a_window_is_an_error():
    sequence = Sequence(PagePool(16), PAGE, reach=Reach(window=8))
    sequence.reserve(40)
    sequence.commit()
    assert [page >= 0 for page in sequence.pages] == 7 * [False] + 3 * [True]
    with pytest.raises(CacheError, match="crop: expected a length whose last pages are still kept"):
        sequence.crop(30)
    assert sequence.length == 40
    sequence.crop(36)
    sequence.reserve(1)


def test_what_was_let_go_once_stays_gone():
    sequence = Sequence(PagePool(16), PAGE, reach=Reach(window=8))
    sequence.reserve(40)
    sequence.commit()
    sequence.crop(36)
    sequence.reserve(1)
    sequence.commit()
    sequence.crop(36)
    # A page before 37 would be 33, but the request was 40 tokens long: its page 6 is used again.
    with pytest.raises(CacheError, match="got 34, for which page 6 is not"):
        sequence.crop(34)
    sequence.crop(35)
    assert sequence.length == 35


def test_a_pool_is_trimmed_to_what_is_held():
    pool = PagePool(8)
    held = [pool.acquire() for _ in range(5)]
    for page in (held[1], held[4]):
        pool.release(page)
    assert (pool.trim(), pool.capacity, pool.free) == (4, 4, 1)
    pool.check()
    assert pool.acquire() == held[1], "the lowest first"
    pool.grow(2)
    assert [pool.acquire(), pool.acquire()] == [4, 5]
    pool.check()
