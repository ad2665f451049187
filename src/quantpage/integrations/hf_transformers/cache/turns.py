"""A cache is used by one thread at a time, and what is done to it is done entirely or not at all.

A forward goes through the model's own code, in which anything may be raised: Ctrl-C, an error of a
hook, no memory. Until it has returned its tokens do not count, and if it does not, the cache is
what it was before. State that is not in pages (linear attention, convolutions) changes in place and
cannot be brought back, so that a cache with such layers says that it is spent.

Two threads may use a model at once, with a cache each. One cache in two threads at once has no
answer that both could mean: the second thread is told so.
"""

from collections.abc import Callable
from threading import get_ident
from typing import Any, NamedTuple, TypeVar

from quantpage.errors import CacheError

R = TypeVar("R")

_KEY = "turn"


class _Turn(NamedTuple):
    thread: int
    number: object
    """Tells turns of a thread apart."""


class Turns:
    """Whose turn it is with one cache."""

    __slots__ = ("_now", "spent")

    def __init__(self) -> None:
        # A dict, whose setdefault is one instruction.
        self._now: dict[str, _Turn] = {}
        self.spent = False
        """State beside the pages was interrupted while it changed, and is neither old nor new."""

    @property
    def mine(self) -> bool:
        """Whether this thread is using the cache."""
        now = self._now.get(_KEY)
        return now is not None and now.thread == get_ident()

    def take(
        self,
        act: Callable[[], R],
        begin: Callable[[], Any] | None = None,
        put_back: Callable[[Any], None] | None = None,
    ) -> R:
        """``act()`` in a turn; inside of one of this thread it is a part of that.

        begin: what ``put_back`` needs to undo ``act``, should it not return; None: nothing to undo.

        Raises CacheError while another thread has its turn, and when the cache is spent.
        """
        if self.mine:
            return act()
        turn, before = _Turn(get_ident(), object()), None
        try:
            try:
                if self._now.setdefault(_KEY, turn) is not turn:
                    raise CacheError(
                        "cache: expected one thread at a time to use it, got a second one; "
                        "fork() gives each a cache of its own"
                    )
                if self.spent:
                    raise CacheError(
                        "cache: spent, as a step was interrupted while layers changed a state "
                        "that is not in pages; reset() it or make another one"
                    )
                if begin is not None:
                    before = begin()
                return act()
            except BaseException:
                if before is not None and put_back is not None:
                    put_back(before)
                raise
            finally:
                self._end(turn)
        finally:
            # Again: Ctrl-C may have come just before the line above.
            self._end(turn)

    def _end(self, turn: _Turn) -> None:
        if self._now.get(_KEY) is turn:
            del self._now[_KEY]
