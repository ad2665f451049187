"""Arguments that count something or name a page: whole numbers, or an error that names them.

Python would take most others and go wrong later: a page of -1 is a list's last, a length of 1.5
is between two tokens.
"""

from collections.abc import Iterable
from operator import index


def whole(name: str, value: int, least: int = 0) -> int:
    """``value`` as a Python integer; ValueError for anything else, and for less than ``least``."""
    try:
        found = index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return found


def page_ids(name: str, pages: Iterable[int], capacity: int) -> list[int]:
    """``pages`` as Python integers; ValueError for one that is not among ``capacity`` pages."""
    found = []
    for each in pages:
        page = whole(name, each)
        if page >= capacity:
            raise ValueError(f"{name}: expected page ids below {capacity}, got {page}")
        found.append(page)
    return found
