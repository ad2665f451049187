"""What the pages of a report share: the template around them, their style, how figures are said."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantpage import console

_ROOM = Path(__file__).parent
_FLAG = re.compile(r"(--kv-format [^\s;]+[^\s;,.]|--[a-z]+(?:-[a-z]+)*)")


def fill(template: str, context: Mapping[str, Any]) -> str:
    """A template of this folder, which extends frame.html, with what it asks for."""
    made = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=FileSystemLoader(_ROOM)
    )
    made.filters |= {"small": _small, "bytes": console.in_units, "flags": _with_flags}
    return made.get_template(template).render(context, style=part("page.css"))


def part(name: str) -> Markup:
    """A file of this folder, to stand in a page as it is."""
    return Markup((_ROOM / name).read_text("utf-8"))


def _with_flags(sentence: str) -> Markup:
    """A sentence whose flags of the command line stand as code."""
    words = _FLAG.split(sentence)
    return Markup("").join(
        Markup("<code>{}</code>").format(each) if at % 2 else each for at, each in enumerate(words)
    )


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
