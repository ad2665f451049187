"""Docstrings here name parameters in prose ("page_size: tokens a page."), as is read well in an
editor. In the reference each becomes an item of a list: an extension of griffe (mkdocs.yml).
"""

import re
from typing import Any

import griffe

_CODE = re.compile(r"``([^`]+)``")


class ParameterList(griffe.Extension):
    """Paragraphs that begin with a parameter's name and a colon, as lists."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """A function, or a class whose fields are its parameters."""
        if obj.docstring is None:
            return
        if isinstance(obj, griffe.Function):
            names = [each.name for each in obj.parameters]
        elif isinstance(obj, griffe.Class):
            names = [name for name, each in obj.members.items() if each.is_attribute]
        else:
            return
        obj.docstring.value = as_list(obj.docstring.value, names)


def as_list(text: str, names: list[str]) -> str:
    """``text`` with each of ``names`` that a colon follows, at the start of a paragraph or of a
    sentence after such a name, on a line of its own."""
    known = "|".join(re.escape(name) for name in names)
    if not known:
        return text
    starts = re.compile(rf"(?:^|(?<=[.;)]))\s*\b({known}): ")
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if starts.match(paragraph):
            pieces = starts.split(paragraph)
            listed = [
                f"- `{name}`: {' '.join(said.split())}"
                for name, said in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            paragraph = "\n".join(listed)
        paragraphs.append(paragraph)
    return _CODE.sub(r"`\1`", "\n\n".join(paragraphs))
