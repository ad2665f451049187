"""A format for each layer: "int8" for all, or "int4,first2=int8,last1=int8"."""

import re
from dataclasses import dataclass

from quantpage.errors import FormatError
from quantpage.formats.spec import KVFormat
from quantpage.formats.table import find_format

_RULE = re.compile(r"(first|last)([1-9][0-9]*)=([a-z0-9_]+)")


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """A default format and exceptions for the first and the last layers."""

    default: KVFormat
    first: int = 0
    first_format: KVFormat | None = None
    last: int = 0
    last_format: KVFormat | None = None

    @classmethod
    def parse(cls, text: str) -> "LayerFormats":
        """Read ``name[,firstN=name][,lastN=name]``; FormatError says what was wrong."""
        name, *rules = [part.strip() for part in text.split(",")]
        found: dict[str, tuple[int, KVFormat]] = {}
        for rule in rules:
            match = _RULE.fullmatch(rule)
            if match is None:
                raise FormatError(
                    f"kv_format: expected rules such as first2=int8 or last1=none after the "
                    f"first comma, got {rule!r}"
                )
            end, count, rule_name = match.groups()
            if end in found:
                raise FormatError(f"kv_format: expected one rule for {end}, got two in {text!r}")
            found[end] = (int(count), find_format(rule_name))
        first, first_format = found.get("first", (0, None))
        last, last_format = found.get("last", (0, None))
        return cls(find_format(name), first, first_format, last, last_format)

    @property
    def name(self) -> str:
        """As it would be written."""
        parts = [self.default.name]
        if self.first_format is not None:
            parts.append(f"first{self.first}={self.first_format.name}")
        if self.last_format is not None:
            parts.append(f"last{self.last}={self.last_format.name}")
        return ",".join(parts)

    def refuse_static(self) -> None:
        """Raise FormatError for formats whose scales would have to come from outside."""
        for each in (self.default, self.first_format, self.last_format):
            if each is not None and not each.dynamic:
                raise FormatError(
                    f"kv_format: expected a dynamic format, as no scales are given here; "
                    f"{each.name} is static"
                )

    def of_layers(self, layers: int) -> tuple[KVFormat, ...]:
        """The format of each of ``layers`` layers; FormatError where the rules overlap."""
        if self.first + self.last > layers:
            raise FormatError(
                f"kv_format: expected first + last to be at most {layers} layers, "
                f"got {self.first} + {self.last}"
            )
        formats = [self.default] * layers
        if self.first_format is not None:
            formats[: self.first] = [self.first_format] * self.first
        if self.last_format is not None:
            formats[layers - self.last :] = [self.last_format] * self.last
        return tuple(formats)
