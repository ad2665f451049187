"""Operations on the books are whole: whatever is raised between whichever instructions."""

import random
import threading

import pytest

from quantpage.cache import PagePool, PrefixCache, Sequence
from quantpage.cache.ledger import Ledger
from quantpage.errors import CacheError, OutOfPages
from tests.interrupted import run

pytestmark = pytest.mark.pure
PAGE = 4


class Books:
    """Two pools, three requests, a prefix cache; ``state`` is all that they say."""

    def __init__(self):
        self.pool, self.exact_pool = PagePool(24), PagePool(24)
        self.known = PrefixCache(self.pool, PAGE, b"seed", self.exact_pool)
        self.requests = [Sequence(self.pool, PAGE, self.exact_pool) for _ in range(3)]
        self.tokens = [[] for _ in range(3)]

    def state(self):
        self.pool.check()
        self.exact_pool.check()
        self.known.check()
        pools = [(p.capacity, p.free, [*map(p.references, range(p.capacity))]) for p in
                 (self.pool, self.exact_pool)]  # fmt: skip
        requests = [
            (each.length, each.reserved, each._looked_at, list(each.pages), list(each.exact_pages))
            for each in self.requests
        ]
        entries = {
            key: (e.parent, e.tokens, e.page, e.exact_page, e.children, e.used)
            for key, e in self.known._entries.items()
        }
        return pools, requests, entries

    def nothing_leaks(self):
        assert self.pool.ledger._notes is None, "no operation is under way"
        for pool, name in ((self.pool, "pages"), (self.exact_pool, "exact_pages")):
            held = [page for each in self.requests for page in getattr(each, name) if page >= 0]
            attribute = "page" if name == "pages" else "exact_page"
            held += [getattr(each, attribute) for each in self.known._entries.values()]
            for page in range(pool.capacity):
                assert pool.references(page) == held.count(page)

    def operations(self, draw):
        """Something that may be done now, by one request."""
        at = draw.randrange(3)
        one, tokens = self.requests[at], self.tokens[at]
        if one.reserved:
            return draw.choice([one.commit, lambda: one.commit(one.reserved // 2), one.free])
        more = draw.randrange(1, 11)
        choices = [
            lambda: one.reserve(more),
            one.free,
            lambda: self.known.evict(2),
            lambda: self.known.evict_exact(1),
            lambda: self.known.insert(tokens[: one.length], one),
            lambda: one.crop(max(one.length - draw.choice((1, PAGE)), 0)),
            lambda: (self.pool.grow(2), self.exact_pool.grow(2)),
            lambda: (self.pool.trim(), self.exact_pool.trim()),
            self.known.clear,
        ]
        if not one.length:
            choices += 3 * [lambda: one._ledger.whole(self.adopt, one, tokens)]
        return draw.choice(choices)

    def adopt(self, one, tokens):
        one.adopt(self.known.acquire(tokens))

    def remember_tokens(self, draw):
        for one, tokens in zip(self.requests, self.tokens, strict=True):
            del tokens[one.length :]
            while len(tokens) < one.length:
                tokens.append(draw.randrange(2))


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_operation_is_done_or_was_never_begun(seed):
    draw = random.Random(seed)
    books, tried, thrown = Books(), 0, 0
    while thrown < 600:
        act, tried = books.operations(draw), tried + 1
        before = books.state()
        at = draw.randrange(1, draw.choice((20, 200, 1500)))

        def attempt(act=act):
            try:
                act()
            except OutOfPages:
                books.known.clear()

        cut = run(attempt, at)[1]
        thrown += cut
        books.nothing_leaks()
        if cut and books.state() == before:
            # A second try succeeds.
            attempt()
            books.nothing_leaks()
        books.remember_tokens(draw)
    assert tried > thrown, "some operations were short enough to end"
    for each in books.requests:
        each.free()
    books.known.evict(24)
    assert books.pool.used == books.exact_pool.used == 0, "what was queued before is found"


def test_every_single_place():
    for at in range(1, 1000):
        books = Books()
        books.requests[0].reserve(5)
        before = books.state()
        thrown = run(books.requests[0].commit, at)[1]
        books.nothing_leaks()
        if not thrown:
            break
        if books.state() == before:
            books.requests[0].commit()
        assert books.requests[0].length == 5
    assert 100 < at < 900


def test_a_part_is_undone_alone_or_with_the_whole():
    ledger, held = Ledger(), []

    def add(value, fails=False):
        ledger.note(held.__delitem__, slice(len(held), None))
        held.append(value)
        if fails:
            raise OutOfPages("no")

    def both(fails):
        ledger.whole(add, 1)
        try:
            ledger.whole(add, 2, fails=True)
        except OutOfPages:
            ledger.whole(add, 3)
        if fails:
            raise OutOfPages("no")

    ledger.whole(both, False)
    assert held == [1, 3]
    with pytest.raises(OutOfPages):
        ledger.whole(both, True)
    assert held == [1, 3]


def test_what_an_undone_operation_looked_at_may_still_go():
    pool = PagePool(8)
    known = PrefixCache(pool, PAGE, b"seed")
    one = Sequence(pool, PAGE)
    one.reserve(PAGE)
    one.commit()
    known.insert(range(PAGE), one)
    one.free()

    def use_and_fail():
        known.acquire(range(PAGE))
        assert known.evict(1) == 0, "it is in use"
        raise OutOfPages("no")

    with pytest.raises(OutOfPages):
        pool.ledger.whole(use_and_fail)
    assert known.evict(1) == 1


def test_pages_have_one_text():
    pool = PagePool(8)
    known = PrefixCache(pool, PAGE, b"seed")
    one = Sequence(pool, PAGE)
    one.reserve(PAGE)
    one.commit()
    known.insert(range(PAGE), one)
    with pytest.raises(CacheError, match="tokens: expected those with which page 0 is remembered"):
        known.insert(range(1, PAGE + 1), one)
    known.check()


def test_what_an_owner_leaves_is_done_before_the_next_operation():
    ledger, order = Ledger(), []

    class Owner:
        pass

    owner = Owner()
    ledger.when_gone(owner, lambda: order.append("freed"))

    def operation():
        nonlocal owner
        owner = None
        order.append("operation")
        raise OutOfPages("no")

    with pytest.raises(OutOfPages):
        ledger.whole(operation)
    assert order == ["operation"], "not in the middle of one that may be undone"
    ledger.whole(order.append, "next")
    ledger.settle()
    assert order == ["operation", "freed", "next"]


def test_threads_share_a_pool():
    pool = PagePool(64)
    known = PrefixCache(pool, PAGE, b"seed")
    errors = []

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(200):
                tokens = [draw.randrange(2) for _ in range(13)]
                one = Sequence(pool, PAGE)
                one.adopt(known.acquire(tokens[:-1]))
                try:
                    one.reserve(13 - one.length)
                except OutOfPages:
                    known.evict(8)
                    one.free()
                    continue
                one.commit()
                known.insert(tokens, one)
                one.free()
        except Exception as error:  # noqa: BLE001 (a thread has nobody to raise to)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert not errors
    pool.check()
    known.check()
    known.clear()
    assert pool.used == 0


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_in_use_is_not_looked_at_again(exact):
    def instructions(in_use):
        pool = PagePool(2 * in_use + 8)
        exact_pool = PagePool(pool.capacity) if exact else None
        known = PrefixCache(pool, PAGE, b"seed", exact_pool)
        for at in range(in_use + 4):
            one = Sequence(pool, PAGE, exact_pool)
            one.reserve(PAGE)
            one.commit()
            known.insert([at] * PAGE, one)
            one.free()
        for at in range(in_use):
            known.acquire([at] * PAGE)
        evict = known.evict_exact if exact else known.evict
        assert evict(1) == 1
        return run(lambda: evict(1))[0]

    assert instructions(500) == instructions(5)


def test_a_token_costs_the_same_after_any_context():
    def instructions(context):
        one = Sequence(PagePool(1024), PAGE, PagePool(1024))
        one.reserve(context)
        one.commit()
        return run(lambda: (one.reserve(1), one.commit()))[0]

    assert instructions(400 * PAGE) == instructions(10 * PAGE)
