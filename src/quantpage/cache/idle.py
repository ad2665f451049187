"""What may go, least recently used first: a heap whose entries are looked at again when taken.

An entry that came back into use, or was used again, stays in the heap and no longer counts. So
adding and taking cost the logarithm of the length, and nothing is searched.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from quantpage.cache.ledger import Ledger

_SMALL = 64
"""Entries below which the heap is not cleaned."""


class IdleQueue:
    """Keys by the time of their last use."""

    def __init__(self, counts: Callable[[bytes, int], bool]) -> None:
        """counts: whether this key, used then, may still go."""
        self._counts = counts
        self._heap: list[tuple[int, bytes]] = []
        self._clean = _SMALL
        """Length at which entries that no longer count are thrown out."""

    def add(self, ledger: Ledger, key: bytes, used: int) -> None:
        """``key``, last used at ``used``, may go. Inside of ``ledger.whole``."""
        if len(self._heap) >= self._clean:
            ledger.keep(self, "_heap")
            kept = {each for each in self._heap if self._counts(each[1], each[0])}
            heap = list(kept)
            heapify(heap)
            self._heap = heap
            self._clean = max(_SMALL, 2 * len(heap))
        # Nothing to note for undoing: ``_counts`` then says no to this entry.
        heappush(self._heap, (used, key))

    def take(self, ledger: Ledger) -> bytes | None:
        """The key that may go first, no longer queued; None: there is none."""
        while self._heap:
            first = self._heap[0]
            # Noted even where it does not count now: it may again once the operation is undone.
            ledger.note(heappush, self._heap, first)
            heappop(self._heap)
            if self._counts(first[1], first[0]):
                return first[1]
        return None
