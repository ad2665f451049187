"""Parameters that docstrings name in prose, as items of a list in the reference: an extension of
griffe (mkdocs.yml). ``page_size: tokens a page.`` reads well in an editor.
"""

import re
from typing import Any

import griffe

_AFTER = re.compile(r"(?<=[.;])\s+(?=Raises |Returns )")
_CODE = re.compile(r"``([^`]+)``")


class ParameterList(griffe.Extension):
    """Paragraphs that begin with a parameter's name and a colon, as lists."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """A function's parameters."""
        if func.docstring is not None:
            names = [each.name for each in func.parameters]
            func.docstring.value = as_list(func.docstring.value, names)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """A class, whose fields are its parameters."""
        if cls.docstring is not None:
            names = [name for name, each in cls.members.items() if each.is_attribute]
            cls.docstring.value = as_list(cls.docstring.value, names)


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
            # What is raised, or returned, is said after the last of them.
            pieces[-1], *rest = _AFTER.split(pieces[-1], maxsplit=1)
            listed = [
                f"- `{name}`: {' '.join(said.split())}"
                for name, said in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            paragraph = "\n\n".join(["\n".join(listed), *rest])
        paragraphs.append(paragraph)
    return _CODE.sub(r"`\1`", "\n\n".join(paragraphs))
