"""Changes that happen entirely or not at all, whatever is raised at whatever line.

Who holds which page is written down in several places: the counts of a pool, the tables of a
request, the tree of a prefix cache. An operation changes all of them or none, though Ctrl-C may
come between any two lines. So it notes how a value is put back before it changes it; when
anything is raised, the notes are read backwards. Putting back is setting an old value, which does
no harm where nothing had been changed yet.

    ledger.whole(act)              the lock, and the notes of what act changes
      ledger.keep(self, "length")  before self.length = ...
      ledger.note(put_back, ...)   before any other change
      other.whole(part)            part of the same operation: undone with it, or alone

One thread at a time is inside. A finalizer may run in the middle of an operation of its own thread,
and what is raised in it is lost, Ctrl-C too: so nothing is done in one but to queue what is to be
done, in one instruction (``when_gone``). A copy of all that may change would be as safe as notes
are, and cost the length of a page table at every token.
"""

import weakref
from collections import deque
from collections.abc import Callable
from threading import RLock
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class _Gone(weakref.ref[object]):
    """Of an owner; what is to be done without it."""

    __slots__ = ("act",)
    act: Callable[[], object]


class Ledger:
    """The notes of one group of books: a pool, the pools beside it, and who holds their pages."""

    __slots__ = ("_notes", "_waiting", "_watching", "lock")

    def __init__(self) -> None:
        self.lock = RLock()
        self._notes: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None
        self._watching: set[_Gone] = set()
        self._waiting: deque[_Gone] = deque()

    def whole(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``act(...)``, of which nothing remains when it raises."""
        with self.lock:
            if self._notes is not None:
                return self._part(act, *args, **kwargs)
            while self._waiting:
                self._alone(self._waiting[0].act)
                self._watching.discard(self._waiting[0])
                self._waiting.popleft()
            return self._alone(act, *args, **kwargs)

    def when_gone(self, owner: object, act: Callable[[], object]) -> None:
        """``act``, whole, before the first operation after ``owner`` is no more.

        act: doing it twice must be as doing it once; it does not know the owner.
        """
        gone = _Gone(owner, self._waiting.append)
        gone.act = act
        self._watching.add(gone)

    def settle(self) -> None:
        """Do what waits for owners that are no more."""
        self.whole(_nothing)

    def _alone(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        notes: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        try:
            try:
                self._notes = notes
                return act(*args, **kwargs)
            except BaseException:
                _put_back(notes, 0)
                raise
            finally:
                self._notes = None
        finally:
            # Again: Ctrl-C may have come just before the line above.
            self._notes = None

    def _part(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        notes = self._notes
        assert notes is not None
        mark = len(notes)
        try:
            return act(*args, **kwargs)
        except BaseException:
            _put_back(notes, mark)
            raise

    def note(self, put_back: Callable[..., object], *args: Any) -> None:
        """Before a change: ``put_back(*args)`` would undo it, made or not."""
        assert self._notes is not None, "a change outside of whole()"
        self._notes.append((put_back, args))

    def keep(self, owner: object, *names: str) -> None:
        """Before attributes change: remember their values."""
        for name in names:
            self.note(setattr, owner, name, getattr(owner, name))


def _put_back(notes: list[tuple[Callable[..., object], tuple[Any, ...]]], mark: int) -> None:
    while len(notes) > mark:
        act, args = notes[-1]
        act(*args)
        # Only now: should Ctrl-C come again, the outer operation reads this note once more.
        notes.pop()


def _nothing() -> None:
    """The operation whose only purpose is what waits."""
