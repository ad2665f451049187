"""Pages of prompts that were seen before: chained hashes to pages, least recently used out first.

A full page is known by the hash of everything before it and its own tokens, so that the same 64
tokens after another beginning are another page:

    seed = hash(model, formats, scales, page_size)      what a code in the page depends on
    hash(page 0) = hash(seed, tokens 0 .. P-1)          hash(page 1) = hash(hash(page 0), tokens)

A hash only proposes: on a hit the tokens themselves are compared, so that a collision costs a miss
and never a wrong answer. The cache holds each of its pages once in the pool; a request that uses
one holds it once more.

A hit ends on a page border, so that the page that the next token stands in is new. Formats with
exact pages need two pages exact besides the codes: the first, and the last of the hit, which the
next queries still see so. Only those that the donor keeps when it is inserted are remembered, the
last few of its prompt, so a hit ends there and not everywhere:

    donor inserted after its prompt of 6 pages     x - - - x x      hits of 6 or 5 pages, or 1
    and after its first chunk of 3 pages, too      x x x x x x      any hit

With a window (``reach``) a hit needs the pages that the next query sees, and of a donor only those
that it still holds are remembered; the pages before them are known by their tokens alone.

Insert a system prompt when it, and nothing after it, has been computed (or after each chunk).

Eviction asks no page whether it may go: the pool tells when all other holders of one have let go of
it, and it is queued by the time of its last use (cache/idle).
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

from quantpage.cache.counts import whole
from quantpage.cache.idle import IdleQueue
from quantpage.cache.layout import CacheLayout
from quantpage.cache.pool import PagePool
from quantpage.cache.reach import EVERYTHING, Reach, exact_seen, pages_seen
from quantpage.cache.sequence import Prefix, Sequence
from quantpage.errors import CacheError


@dataclass(slots=True)
class _Entry:
    parent: bytes
    tokens: bytes
    """Of the page, eight bytes each."""
    page: int
    """-1: not remembered (the donor's window had left it)."""
    exact_page: int = -1
    """-1: not remembered."""
    children: int = 0
    used: int = 0
    """When it was last used, in uses; of pages used together, the last of the prompt first."""


@dataclass(frozen=True, slots=True)
class RememberedPage:
    """A page as a file keeps it: its tokens, what it follows, and where it lies."""

    parent: int
    """Place in the list of the page that it follows; -1: it begins a prompt."""
    tokens: tuple[int, ...]
    page: int
    """-1: not remembered."""
    exact_page: int = -1


def prefix_seed(model: str, layouts: dict[int, CacheLayout], scales: bytes = b"") -> bytes:
    """What every page's content depends on besides its tokens.

    model: a name or a checksum of the weights. scales: a digest of static scales
    (``StaticScales.digest``) and of key maps (``KeyMap.digest`` of each layer), empty without.
    """
    seed = blake2b(model.encode(), digest_size=16)
    for index in sorted(layouts):
        seed.update(f"{index} {layouts[index]!r}".encode())
    seed.update(scales)
    return seed.digest()


class PrefixCache:
    """Full pages of finished or running prompts, found by their tokens.

    Every operation is whole (cache/ledger) and may be called from any thread.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        seed: bytes,
        exact_pool: PagePool | None = None,
        reach: Reach = EVERYTHING,
    ) -> None:
        self._pool, self._exact_pool = pool, exact_pool
        self.page_size = whole("page_size", page_size, 1)
        pool.watch(self._alone_with)
        if exact_pool is not None:
            exact_pool.join(pool)
            exact_pool.watch(self._alone_with_exact)
        self._ledger = pool.ledger
        self._seed, self._reach = seed, reach
        self._roots = {seed}
        self._uses = 0
        self._entries: dict[bytes, _Entry] = {}
        # Page -> its entry, and those that may go: an entry without children whose page, or any
        # entry whose exact page, is held by nobody else.
        self._by_page: dict[int, bytes] = {}
        self._by_exact_page: dict[int, bytes] = {}
        self._idle = IdleQueue(self._may_go)
        self._idle_exact = IdleQueue(self._exact_may_go)

    def __len__(self) -> int:
        """Pages that are held."""
        return len(self._by_page)

    @property
    def idle_pages(self) -> int:
        """Of the pages that are held, those that nobody else holds and that may go."""
        with self._ledger.lock:
            return sum(self._pool.references(page) == 1 for page in self._by_page)

    def find(self, tokens: Tokens[int], salt: bytes = b"") -> Prefix:
        """The longest known beginning of ``tokens``; changes nothing."""
        with self._ledger.lock:
            return self._prefix([entry for _, entry in self._usable(tokens, salt)])

    def acquire(self, tokens: Tokens[int], salt: bytes = b"") -> Prefix:
        """``find``, held for the caller (``Sequence.adopt``) and counted as used now.

        Give all but the last token of a prompt: at least one has to be computed for its logits.
        """
        return self._ledger.whole(self._acquire, tokens, salt)

    def hits(self, tokens: Tokens[int], salt: bytes = b"") -> set[int]:
        """Every count of pages at which a hit may end; a model with several tables takes the
        largest that all of them have."""
        with self._ledger.lock:
            return {end for end, _ in self._ends(tokens, salt)}

    def insert(self, tokens: Tokens[int], sequence: Sequence, salt: bytes = b"") -> int:
        """Remember the full pages of ``sequence``, which has cached ``tokens``; pages added.

        Tokens past ``sequence.length`` are not cached yet and are left out.
        """
        return self._ledger.whole(self._insert, tokens, sequence, salt)

    def evict(self, pages: int) -> int:
        """Let go of up to ``pages`` pages that only this cache holds; how many became free.

        Least recently used first, and a page only after those that follow it.
        """
        return self._ledger.whole(self._evict, pages)

    def evict_exact(self, pages: int) -> int:
        """Let go of up to ``pages`` exact pages that only this cache holds; how many became free.

        Least recently used first. Codes stay; a hit ends earlier until a donor is inserted again.
        """
        return self._ledger.whole(self._evict_exact, pages)

    def clear(self) -> None:
        """Let go of every page; requests that use one keep it."""
        self._ledger.whole(self._clear)

    def remembered_pages(self) -> list[RememberedPage]:
        """Every page that was remembered without a salt, the most recently used first.

        A page stands before those that follow it, so that any beginning of the list is whole.
        """
        with self._ledger.lock:
            # A page is used whenever one behind it is, and counts as used later.
            found = sorted(self._entries.items(), key=lambda each: -each[1].used)
            at = {self._seed: -1}
            made: list[RememberedPage] = []
            for key, entry in found:
                if entry.parent in at:
                    at[key] = len(made)
                    tokens = tuple(array("q", entry.tokens))
                    made.append(
                        RememberedPage(at[entry.parent], tokens, entry.page, entry.exact_page)
                    )
            return made

    def restore(self, pages: Tokens[RememberedPage]) -> None:
        """Remember what ``remembered_pages`` gave, so used, in pages that the caller holds.

        Pages known by their tokens are left as they are.
        """
        self._ledger.whole(self._restore, pages)

    def check(self) -> None:
        """Raise CacheError unless chains, counts and the pool agree."""
        with self._ledger.lock:
            self._check()

    def _acquire(self, tokens: Tokens[int], salt: bytes) -> Prefix:
        chain = self._usable(tokens, salt)
        self._use(chain)
        prefix = self._prefix([entry for _, entry in chain])
        self._pool.share_all(page for page in prefix.pages if page >= 0)
        if self._exact_pool is not None:
            self._exact_pool.share_all(page for page in prefix.exact_pages if page >= 0)
        return prefix

    def _insert(self, tokens: Tokens[int], sequence: Sequence, salt: bytes) -> int:
        added, parent, chain = 0, self._root(salt), []
        for index, own in enumerate(self._full_pages(tokens, sequence.length)):
            key = _chained(parent, own)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._add(key, _Entry(parent, own, -1))
            elif entry.tokens != own or entry.parent != parent:
                # Another page has this hash: it stays, and this chain ends here.
                break
            if entry.page < 0 <= sequence.pages[index]:
                self._add_page(key, entry, sequence.pages[index])
                added += 1
            if self._exact_pool is not None and entry.exact_page < 0:
                self._add_exact(key, entry, sequence.exact_pages[index])
            chain.append((key, entry))
            parent = key
        self._use(chain)
        return added

    def _add(self, key: bytes, entry: _Entry) -> _Entry:
        self._ledger.note(self._entries.pop, key, None)
        self._entries[key] = entry
        above = self._entries.get(entry.parent)
        if above is not None:
            self._ledger.keep(above, "children")
            above.children += 1
        return entry

    def _add_page(self, key: bytes, entry: _Entry, page: int) -> None:
        if page in self._by_page:
            raise CacheError(
                f"tokens: expected those with which page {page} is remembered, got others"
            )
        self._pool.share(page)
        self._ledger.keep(entry, "page")
        entry.page = page
        self._ledger.note(self._by_page.pop, page, None)
        self._by_page[page] = key

    def _add_exact(self, key: bytes, entry: _Entry, page: int) -> None:
        if page < 0 or page in self._by_exact_page:
            return
        assert self._exact_pool is not None
        self._exact_pool.share(page)
        self._ledger.keep(entry, "exact_page")
        entry.exact_page = page
        self._ledger.note(self._by_exact_page.pop, page, None)
        self._by_exact_page[page] = key

    def _root(self, salt: bytes) -> bytes:
        """What the first page follows; salt: what keys depend on besides model and tokens."""
        if not salt:
            return self._seed
        root = blake2b(self._seed + salt, digest_size=16).digest()
        self._roots.add(root)
        return root

    def _use(self, chain: list[tuple[bytes, _Entry]]) -> None:
        """Count the pages of a prompt as used now."""
        note, now = self._ledger.note, self._uses
        self._ledger.keep(self, "_uses")
        self._uses += len(chain)
        for key, entry in reversed(chain):
            now += 1
            note(setattr, entry, "used", entry.used)
            entry.used = now
            if not entry.children:
                self._queue(key, entry)
            if entry.exact_page >= 0:
                self._queue_exact(key, entry)

    def _queue(self, key: bytes, entry: _Entry) -> None:
        if self._may_go(key, entry.used):
            self._idle.add(self._ledger, key, entry.used)

    def _queue_exact(self, key: bytes, entry: _Entry) -> None:
        if self._exact_may_go(key, entry.used):
            self._idle_exact.add(self._ledger, key, entry.used)

    def _may_go(self, key: bytes, used: int) -> bool:
        entry = self._entries.get(key)
        return (
            entry is not None
            and entry.used == used
            and not entry.children
            and (entry.page < 0 or self._pool.references(entry.page) == 1)
        )

    def _exact_may_go(self, key: bytes, used: int) -> bool:
        entry = self._entries.get(key)
        return (
            entry is not None
            and entry.used == used
            and entry.exact_page >= 0
            and self._exact_pool is not None
            and self._exact_pool.references(entry.exact_page) == 1
        )

    def _alone_with(self, page: int) -> None:
        """The pool's word: one holder of ``page`` is left."""
        key = self._by_page.get(page)
        if key is not None:
            self._queue(key, self._entries[key])

    def _alone_with_exact(self, page: int) -> None:
        key = self._by_exact_page.get(page)
        if key is not None:
            self._queue_exact(key, self._entries[key])

    def _restore(self, pages: Tokens[RememberedPage]) -> None:
        keys: list[bytes] = []
        for each in pages:
            parent = keys[each.parent] if each.parent >= 0 else self._seed
            own = array("q", each.tokens).tobytes()
            key = _chained(parent, own)
            keys.append(key)
            entry = self._entries.get(key) or self._add(key, _Entry(parent, own, -1))
            if entry.page < 0 <= each.page:
                self._add_page(key, entry, each.page)
            if self._exact_pool is not None and entry.exact_page < 0:
                self._add_exact(key, entry, each.exact_page)
        self._use([(key, self._entries[key]) for key in dict.fromkeys(keys)])

    def _evict(self, pages: int) -> int:
        freed = 0
        while freed < pages and (key := self._idle.take(self._ledger)) is not None:
            freed += self._entries[key].page >= 0
            self._drop(key)
        return freed

    def _evict_exact(self, pages: int) -> int:
        freed = 0
        while freed < pages and (key := self._idle_exact.take(self._ledger)) is not None:
            self._drop_exact(self._entries[key])
            freed += 1
        return freed

    def _clear(self) -> None:
        leaves = [key for key, entry in self._entries.items() if not entry.children]
        for key in leaves:
            above: bytes | None = key
            while above is not None and not self._entries[above].children:
                parent = self._entries[above].parent
                self._drop(above)
                above = parent if parent in self._entries else None

    def _check(self) -> None:
        children = dict.fromkeys(self._entries, 0)
        pages = [entry.page for entry in self._entries.values() if entry.page >= 0]
        if len(set(pages)) != len(pages):
            raise CacheError("prefix cache: a page is remembered twice")
        for entry in self._entries.values():
            if entry.page >= 0 and not self._pool.references(entry.page):
                raise CacheError(f"prefix cache: page {entry.page} is remembered but not held")
            if entry.parent in children:
                children[entry.parent] += 1
            elif entry.parent not in self._roots:
                raise CacheError(f"prefix cache: page {entry.page} follows a page that is gone")
        for key, entry in self._entries.items():
            if entry.children != children[key]:
                raise CacheError(f"prefix cache: page {entry.page} miscounts what follows it")

    def _walk(self, tokens: Tokens[int], salt: bytes) -> Iterator[tuple[bytes, _Entry]]:
        parent = self._root(salt)
        for own in self._full_pages(tokens, len(tokens)):
            key = _chained(parent, own)
            entry = self._entries.get(key)
            if entry is None or entry.tokens != own or entry.parent != parent:
                return
            yield key, entry
            parent = key

    def _ends(
        self, tokens: Tokens[int], salt: bytes
    ) -> Iterator[tuple[int, list[tuple[bytes, _Entry]]]]:
        """(pages, their chain) of every hit whose next query finds what it sees."""
        chain: list[tuple[bytes, _Entry]] = []
        missing = -1
        for each in self._walk(tokens, salt):
            if each[1].page < 0:
                missing = len(chain)
            chain.append(each)
            if missing < self._seen(len(chain)).start and all(
                chain[at][1].exact_page >= 0 for at in self._seen_exactly(len(chain))
            ):
                yield len(chain), chain

    def _usable(self, tokens: Tokens[int], salt: bytes) -> list[tuple[bytes, _Entry]]:
        """The known pages of ``tokens`` up to the last place where a hit may end."""
        ends = [(0, list[tuple[bytes, _Entry]]()), *self._ends(tokens, salt)]
        return ends[-1][1][: ends[-1][0]]

    def _seen(self, pages: int) -> range:
        """Of a hit of so many pages, those that the next query sees."""
        return pages_seen(
            self._reach, pages * self.page_size, pages * self.page_size, self.page_size
        )

    def _seen_exactly(self, pages: int) -> list[int]:
        if self._exact_pool is None:
            return []
        tokens = pages * self.page_size
        return exact_seen(self._reach, tokens, tokens, self.page_size)

    def _prefix(self, found: list[_Entry]) -> Prefix:
        seen, exactly = self._seen(len(found)), self._seen_exactly(len(found))
        pages = tuple(entry.page if at in seen else -1 for at, entry in enumerate(found))
        if self._exact_pool is None:
            return Prefix(pages)
        exact = [entry.exact_page if at in exactly else -1 for at, entry in enumerate(found)]
        return Prefix(pages, tuple(exact))

    def _full_pages(self, tokens: Tokens[int], length: int) -> Iterator[bytes]:
        """The tokens of each full page among the first ``length``."""
        flat, size = array("q", tokens).tobytes(), 8 * self.page_size
        for end in range(size, 8 * min(len(tokens), length) + 1, size):
            yield flat[end - size : end]

    def _drop(self, key: bytes) -> None:
        note, entry = self._ledger.note, self._entries[key]
        if entry.exact_page >= 0:
            self._drop_exact(entry)
        note(self._entries.__setitem__, key, entry)
        del self._entries[key]
        if entry.page >= 0:
            note(self._by_page.__setitem__, entry.page, key)
            del self._by_page[entry.page]
            self._pool.release(entry.page)
        above = self._entries.get(entry.parent)
        if above is not None:
            self._ledger.keep(above, "children")
            above.children -= 1
            self._queue(entry.parent, above)

    def _drop_exact(self, entry: _Entry) -> None:
        page = entry.exact_page
        assert self._exact_pool is not None
        self._ledger.keep(entry, "exact_page")
        entry.exact_page = -1
        self._ledger.note(self._by_exact_page.__setitem__, page, self._by_exact_page[page])
        del self._by_exact_page[page]
        self._exact_pool.release(page)


def _chained(parent: bytes, tokens: bytes) -> bytes:
    return blake2b(parent + tokens, digest_size=16).digest()
