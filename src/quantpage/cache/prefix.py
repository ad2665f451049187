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
"""

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

from quantpage.cache.layout import CacheLayout
from quantpage.cache.pool import PagePool
from quantpage.cache.reach import EVERYTHING, Reach, exact_seen, pages_seen
from quantpage.cache.sequence import Prefix, Sequence
from quantpage.errors import CacheError


@dataclass(slots=True)
class _Entry:
    parent: bytes
    tokens: tuple[int, ...]
    page: int
    """-1: not remembered (the donor's window had left it)."""
    exact_page: int = -1
    """-1: not remembered."""
    children: int = 0


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
    """Full pages of finished or running prompts, found by their tokens."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        seed: bytes,
        exact_pool: PagePool | None = None,
        reach: Reach = EVERYTHING,
    ) -> None:
        self._pool, self._exact_pool, self.page_size = pool, exact_pool, page_size
        self._seed, self._reach = seed, reach
        # Least recently used first; of pages used together, the last of the prompt first.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        """Pages that are held."""
        return sum(entry.page >= 0 for entry in self._entries.values())

    def find(self, tokens: Tokens[int]) -> Prefix:
        """The longest known beginning of ``tokens``; changes nothing."""
        return self._prefix([entry for _, entry in self._usable(tokens)])

    def acquire(self, tokens: Tokens[int]) -> Prefix:
        """``find``, held for the caller (``Sequence.adopt``) and counted as used now.

        Give all but the last token of a prompt: at least one has to be computed for its logits.
        """
        chain = self._usable(tokens)
        for key, _ in reversed(chain):
            self._entries.move_to_end(key)
        prefix = self._prefix([entry for _, entry in chain])
        for page in prefix.pages:
            if page >= 0:
                self._pool.share(page)
        for page in prefix.exact_pages:
            if page >= 0 and self._exact_pool is not None:
                self._exact_pool.share(page)
        return prefix

    def hits(self, tokens: Tokens[int]) -> set[int]:
        """Every count of pages at which a hit may end; a model with several tables takes the
        largest that all of them have."""
        return {end for end, _ in self._ends(tokens)}

    def insert(self, tokens: Tokens[int], sequence: Sequence) -> int:
        """Remember the full pages of ``sequence``, which has cached ``tokens``; pages added.

        Tokens past ``sequence.length`` are not cached yet and are left out.
        """
        added, parent, chain = 0, self._seed, []
        for index in range(min(len(tokens), sequence.length) // self.page_size):
            own = self._page_tokens(tokens, index)
            key = _chained(parent, own)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(parent, own, -1)
                if index:
                    self._entries[parent].children += 1
            elif entry.tokens != own or entry.parent != parent:
                # Another page has this hash: it stays, and this chain ends here.
                break
            page = sequence.pages[index]
            if entry.page < 0 <= page:
                entry.page = self._pool.share(page)
                added += 1
            if self._exact_pool is not None and entry.exact_page < 0:
                exact = sequence.exact_pages[index]
                entry.exact_page = exact if exact < 0 else self._exact_pool.share(exact)
            chain.append(key)
            parent = key
        for key in reversed(chain):
            self._entries.move_to_end(key)
        return added

    def evict(self, pages: int) -> int:
        """Let go of up to ``pages`` pages that only this cache holds; how many became free.

        Least recently used first, and a page only after those that follow it.
        """
        freed = 0
        while freed < pages:
            key = next((key for key in self._entries if self._evictable(key)), None)
            if key is None:
                break
            freed += self._entries[key].page >= 0
            self._drop(key)
        return freed

    def evict_exact(self, pages: int) -> int:
        """Let go of up to ``pages`` exact pages that only this cache holds; how many became free.

        Least recently used first. Codes stay; a hit ends earlier until a donor is inserted again.
        """
        if self._exact_pool is None:
            return 0
        freed = 0
        for entry in self._entries.values():
            if freed == pages:
                break
            if entry.exact_page >= 0 and self._exact_pool.references(entry.exact_page) == 1:
                self._exact_pool.release(entry.exact_page)
                entry.exact_page = -1
                freed += 1
        return freed

    def clear(self) -> None:
        """Let go of every page; requests that use one keep it."""
        while self._entries:
            self._drop(next(key for key, entry in self._entries.items() if not entry.children))

    def check(self) -> None:
        """Raise CacheError unless chains, counts and the pool agree."""
        children = dict.fromkeys(self._entries, 0)
        pages = [entry.page for entry in self._entries.values() if entry.page >= 0]
        if len(set(pages)) != len(pages):
            raise CacheError("prefix cache: a page is remembered twice")
        for entry in self._entries.values():
            if entry.page >= 0 and not self._pool.references(entry.page):
                raise CacheError(f"prefix cache: page {entry.page} is remembered but not held")
            if entry.parent in children:
                children[entry.parent] += 1
            elif entry.parent != self._seed:
                raise CacheError(f"prefix cache: page {entry.page} follows a page that is gone")
        for key, entry in self._entries.items():
            if entry.children != children[key]:
                raise CacheError(f"prefix cache: page {entry.page} miscounts what follows it")

    def _walk(self, tokens: Tokens[int]) -> Iterator[tuple[bytes, _Entry]]:
        parent = self._seed
        for index in range(len(tokens) // self.page_size):
            own = self._page_tokens(tokens, index)
            key = _chained(parent, own)
            entry = self._entries.get(key)
            if entry is None or entry.tokens != own or entry.parent != parent:
                return
            yield key, entry
            parent = key

    def _ends(self, tokens: Tokens[int]) -> Iterator[tuple[int, list[tuple[bytes, _Entry]]]]:
        """(pages, their chain) of every hit whose next query finds what it sees."""
        chain: list[tuple[bytes, _Entry]] = []
        missing = -1
        for each in self._walk(tokens):
            if each[1].page < 0:
                missing = len(chain)
            chain.append(each)
            if missing < self._seen(len(chain)).start and all(
                chain[at][1].exact_page >= 0 for at in self._seen_exactly(len(chain))
            ):
                yield len(chain), chain

    def _usable(self, tokens: Tokens[int]) -> list[tuple[bytes, _Entry]]:
        """The known pages of ``tokens`` up to the last place where a hit may end."""
        ends = [(0, list[tuple[bytes, _Entry]]()), *self._ends(tokens)]
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

    def _page_tokens(self, tokens: Tokens[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.page_size : (index + 1) * self.page_size])

    def _evictable(self, key: bytes) -> bool:
        entry = self._entries[key]
        free = entry.page < 0 or self._pool.references(entry.page) == 1
        return not entry.children and free

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        if entry.page >= 0:
            self._pool.release(entry.page)
        if entry.exact_page >= 0 and self._exact_pool is not None:
            self._exact_pool.release(entry.exact_page)
        if entry.parent in self._entries:
            self._entries[entry.parent].children -= 1


def _chained(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    own = blake2b(parent, digest_size=16)
    for token in tokens:
        own.update(token.to_bytes(8, "little", signed=True))
    return own.digest()
