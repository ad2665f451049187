"""Known prompts in a file, so that another process begins with them: the pages of the prefix
cache, bit for bit, in a file of pages (cache/saved) whose note says whose tokens they hold.

    model       digest of weights, configuration and mask
    prefixes    for each reach: its layers, and its pages, the most recently used first:
                [parent, page, exact page, tokens ...], pages numbered in this order

The basis (key maps, given scales) is in the file too, and has to be the engine's.
"""

from typing import Any

import torch
from torch import Tensor

from quantpage.cache import HostPages, KnownPages, PagedKVCache, PagePool, Reach, RememberedPage
from quantpage.cache.paged import layer_of
from quantpage.cache.saved import SavedPages
from quantpage.cache.tensor_file import Damaged, shown, whole_number
from quantpage.integrations.hf_transformers.pages.memory import Memory, Shelf


def collect(memory: Memory, known: KnownPages, model: str) -> SavedPages:
    """What is remembered, copied to the host."""
    planes: dict[str, Tensor] = {}
    counts: dict[int, tuple[int, int]] = {}
    prefixes = []
    for reach, cache in known.items():
        store, pages = memory.shelves[reach].store, cache.remembered_pages()
        held = [each.page for each in pages if each.page >= 0]
        exact = [each.exact_page for each in pages if each.exact_page >= 0]
        planes |= store.to_save(held, exact)
        counts |= dict.fromkeys(store.layouts, (len(held), len(exact)))
        number, exact_number = ({page: at for at, page in enumerate(x)} for x in (held, exact))
        prefixes.append(
            {
                "reach": [reach.window, reach.chunk],
                "layers": sorted(store.layouts),
                "pages": [
                    [
                        each.parent,
                        number.get(each.page, -1),
                        exact_number.get(each.exact_page, -1),
                        *each.tokens,
                    ]
                    for each in pages
                ],
            }
        )
    note = {"model": model, "prefixes": prefixes}
    return SavedPages(memory.layouts, counts, planes, note)


def restore(memory: Memory, known: KnownPages, saved: SavedPages, model: str) -> int:
    """Remember what ``collect`` gave, as much of it as has room, the latest first; pages.

    saved: of the memory's layouts. Raises Damaged, with nothing changed, where it is of another
    model or calibration, or cannot be.
    """
    if saved.note.get("model") != model:
        raise Damaged("expected pages of this model, got those of another")
    found = _checked(memory, known, saved)
    restored = 0
    for reach, cache in known.items():
        shelf = memory.shelves[reach]
        pages, counts = _that_fit(found[reach], shelf)
        held = _taken(shelf.pool, counts[0])
        exact = _taken(shelf.exact_pool, counts[1])
        _write(shelf.store, saved, held, exact)
        cache.restore(
            [
                RememberedPage(
                    each.parent,
                    each.tokens,
                    held[each.page] if each.page >= 0 else -1,
                    exact[each.exact_page] if 0 <= each.exact_page < len(exact) else -1,
                )
                for each in pages
            ]
        )
        # The prefix cache holds them now.
        shelf.pool.release_all(held)
        if shelf.exact_pool is not None:
            shelf.exact_pool.release_all(exact)
        restored = max(restored, len(held))
    return restored


def _that_fit(
    pages: list[RememberedPage], shelf: Shelf
) -> tuple[list[RememberedPage], tuple[int, int]]:
    """The longest beginning that the pool has room for, and its pages and exact pages."""
    free = shelf.pool.free
    end = next((at for at, each in enumerate(pages) if each.page >= free), len(pages))
    kept = pages[:end]
    exact_free = 0 if shelf.exact_pool is None else shelf.exact_pool.free
    exact = sum(each.exact_page >= 0 for each in kept)
    return kept, (sum(each.page >= 0 for each in kept), min(exact, exact_free))


def _taken(pool: PagePool | None, pages: int) -> list[int]:
    return [] if pool is None else pool.acquire_all(pages)


def _write(store: PagedKVCache, saved: SavedPages, held: list[int], exact: list[int]) -> None:
    planes = {}
    for name, plane in saved.planes.items():
        if layer_of(name) not in store.layouts:
            continue
        count = exact if name.partition(".")[2].startswith("exact_") else held
        planes[name] = plane[: len(count)]
    store.swap_in(HostPages(planes, len(held), len(exact)), held, exact)


def _checked(
    memory: Memory, known: KnownPages, saved: SavedPages
) -> dict[Reach, list[RememberedPage]]:
    """What the note says, by reach, when all of it can be."""
    found: dict[Reach, list[RememberedPage]] = {}
    prefixes = saved.note.get("prefixes")
    if type(prefixes) is not list:
        raise Damaged("expected known prompts, got pages without them")
    for each in prefixes:
        if type(each) is not dict or set(each) != {"reach", "layers", "pages"}:
            raise Damaged(f"prefixes: expected reach, layers and pages, got {shown(each)}")
        reach = next(
            (x for x, _ in known.items() if [x.window, x.chunk] == each["reach"]),
            None,
        )
        if reach is None or reach in found:
            raise Damaged(f"reach: expected one of the model's, once, got {shown(each['reach'])}")
        store = memory.shelves[reach].store
        if each["layers"] != sorted(store.layouts):
            raise Damaged(f"layers of {reach}: expected {sorted(store.layouts)}, got others")
        for name, plane in store.basis().items():
            mine = saved.planes.get(name)
            if mine is None or not torch.equal(mine, plane.cpu()):
                raise Damaged(f"{name}: expected that of this engine's calibration, got another")
        counts = {saved.counts[index] for index in store.layouts}
        found[reach] = _pages(each["pages"], memory.page_size, counts)
    if set(found) != {reach for reach, _ in known.items()}:
        raise Damaged(f"prefixes: expected those of every reach, got {len(found)}")
    extra = set(saved.planes) - {
        name
        for shelf in memory.shelves.values()
        for name in (*shelf.store.to_save([], []), *shelf.store.basis())
    }
    if extra:
        raise Damaged(f"expected the planes of this engine's pages, got {shown(sorted(extra))}")
    return found


def _pages(given: Any, page_size: int, counts: set[tuple[int, int]]) -> list[RememberedPage]:
    if type(given) is not list:
        raise Damaged(f"pages: expected a list, got {shown(given)}")
    made: list[RememberedPage] = []
    ends = [0, 0]
    for at, each in enumerate(given):
        if type(each) is not list or len(each) != 3 + page_size:
            raise Damaged(f"pages: expected {3 + page_size} numbers, got {shown(each)}")
        parent, *pages = each[:3]
        if not whole_number(parent, -1, at - 1):
            raise Damaged(f"pages: expected a page before it, got {shown(parent)}")
        for which, page in enumerate(pages):
            if page != -1:
                if type(page) is not int or page != ends[which]:
                    raise Damaged(f"pages: expected -1 or {ends[which]}, got {shown(page)}")
                ends[which] += 1
        if not all(map(whole_number, each[3:])):
            raise Damaged(f"pages: expected token ids, got {shown(each[3:])}")
        made.append(RememberedPage(parent, tuple(each[3:]), *pages))
    if counts != {(ends[0], ends[1])}:
        raise Damaged(f"pages: expected {sorted(counts)}, got {ends}")
    return made
