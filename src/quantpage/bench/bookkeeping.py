"""The books alone: pools, requests and the prefix cache, without a tensor.

    quantpage bench bookkeeping --out benchmarks/results/bookkeeping.csv

Plain Python in one thread, its own CPU time. Counted are pages or tokens, since a call may be of
many; each case ends with a check of the books.
"""

import time
from collections.abc import Callable
from pathlib import Path

from quantpage.bench.rows import Rows, environment
from quantpage.cache import PagePool, PrefixCache, Sequence

PAGE = 64
REQUESTS = 32

Act = Callable[[], int]
"""What is timed; returns how many operations it did."""


def single_pages(count: int) -> Act:
    """Acquire and release, a page a call."""
    pool = PagePool(1024)

    def act() -> int:
        for _ in range(count // 2):
            pool.release(pool.acquire())
        pool.check()
        return count // 2 * 2

    return act


def decode_steps(count: int, context: int, exact: bool) -> Act:
    """A token a step of every request: reserve and commit are an operation each."""
    pool = PagePool(REQUESTS * (context // PAGE + count // REQUESTS // PAGE + 2))
    exact_pool = PagePool(pool.capacity) if exact else None
    requests = [Sequence(pool, PAGE, exact_pool) for _ in range(REQUESTS)]
    for each in requests:
        each.reserve(context)
        each.commit()
    steps = count // REQUESTS // 2

    def act() -> int:
        for _ in range(steps):
            for each in requests:
                each.reserve(1)
                each.commit()
        pool.check()
        return steps * REQUESTS * 2

    return act


def prompts(count: int) -> Act:
    """Prompts of 32 pages, of which 24 are known: find, hold, compute, remember, let go, evict.

    Pages found, inserted, released and evicted count one each.
    """
    pool = PagePool(4096)
    known = PrefixCache(pool, PAGE, b"bench")

    def act() -> int:
        done, turn = 0, 0
        while done < count:
            tokens = [turn % 7] * (24 * PAGE) + [turn] * (8 * PAGE)
            one = Sequence(pool, PAGE)
            one.adopt(known.acquire(tokens[:-1]))
            done += len(one.pages)
            rest = len(tokens) - one.length
            if rest // PAGE > pool.free:
                done += known.evict(512)
            one.reserve(rest)
            one.commit()
            done += known.insert(tokens, one) + len(one.pages)
            one.free()
            turn += 1
        pool.check()
        known.check()
        return done

    return act


def evictions(count: int) -> Act:
    """A page a call, of a cache whose least recently used half is in use."""
    prompt, count = 10, count // 10 * 10
    pool = PagePool(2 * count)
    known = PrefixCache(pool, PAGE, b"bench")
    for at in range(2 * count // prompt):
        one = Sequence(pool, PAGE)
        one.reserve(prompt * PAGE)
        one.commit()
        known.insert([at] * (prompt * PAGE), one)
        one.free()
    for at in range(count // prompt):
        known.acquire([at] * (prompt * PAGE))

    def act() -> int:
        freed = sum(known.evict(1) for _ in range(count))
        known.check()
        return freed

    return act


CASES: dict[str, Callable[[int], Act]] = {
    "pool, a page a call": single_pages,
    "requests, 8k context": lambda count: decode_steps(count, 8192, exact=False),
    "requests, 128k context, exact pages": lambda count: decode_steps(count, 131_072, exact=True),
    "prefix cache, prompts of 32 pages": prompts,
    # A tenth: twice as many pages have to be remembered first.
    "prefix cache, evict beside pages in use": lambda count: evictions(count // 10),
}


def measure(operations: int, out: Path | None = None) -> list[dict[str, object]]:
    """A row a case."""
    rows = Rows(out, environment("cpu"), case=42, operations=-10, seconds=-7, microseconds_each=-7)
    for name, prepare in CASES.items():
        act = prepare(operations)
        start = time.process_time()
        done = act()
        seconds = time.process_time() - start
        rows.add(
            {
                "case": name,
                "operations": done,
                "seconds": f"{seconds:.2f}",
                "microseconds_each": f"{seconds / done * 1e6:.2f}",
                "clock": "cpu",
            }
        )
    return rows.made
