"""What was made of an object, kept while that lives.

By its address, which is quicker to look up than its value, and which another object may have as
soon as this one is dead. So what is kept must go with it: by a callback that is no Python. What is
raised in a callback is lost, Ctrl-C too, which comes between two lines of Python and of nothing
else, and what was kept would have stayed for whatever comes to lie there.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

Owner = TypeVar("Owner")
Made = TypeVar("Made")


class KeptWith(Generic[Owner, Made]):
    """``make(owner)``, once while each owner lives; what is made may not hold it."""

    __slots__ = ("_kept", "_make")

    def __init__(self, make: Callable[[Owner], Made]) -> None:
        self._make = make
        self._kept: dict[int, tuple[Made, weakref.ref[Owner]]] = {}

    def __call__(self, owner: Owner) -> Made:
        """What was made of ``owner``."""
        number = id(owner)
        found = self._kept.get(number)
        if found is None:
            # Called with the reference, which is what ``pop`` gives back where nothing is.
            gone = weakref.ref(owner, partial(self._kept.pop, number))  # type: ignore[arg-type]
            found = self._kept[number] = self._make(owner), gone
        return found[0]
