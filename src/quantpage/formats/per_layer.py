"""A format for each layer: "int8" for all, or a default and exceptions after commas.

int4,first2=int8,last1=none         the first two layers, and the last
int4,layers=0-3,20:int8             these layers; ranges include both ends
k=int8,v=int4,first1=k=none,v=int8  keys and values by name, wherever a name may stand
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from quantpage.errors import FormatError
from quantpage.formats.spec import KVFormat
from quantpage.formats.table import find_format

_KINDS = ("first", "last", "layers")
_END = re.compile(r"(first|last)([1-9][0-9]*)=(.+)")
_LAYERS = re.compile(r"layers=([^:]*):(.+)")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_HALF = re.compile(r"(?:.*[=:])?([kv])=[^=:,]*")


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Which layers have another format than the default."""

    kind: str
    """'first', 'last' or 'layers'."""
    format: KVFormat
    count: int = 0
    """Of layers, from the first or the last on."""
    ranges: tuple[tuple[int, int], ...] = ()
    """(first, last) layer of each range, of 'layers'."""

    @property
    def selector(self) -> str:
        """The layers, as they would be written."""
        if self.kind != "layers":
            return f"{self.kind}{self.count}="
        return f"layers={_words(self.ranges, ',')}:"

    @property
    def words(self) -> str:
        """The layers, for a reader: "first 2", "0-3, 20"."""
        if self.kind != "layers":
            return f"{self.kind} {self.count}"
        return _words(self.ranges, ", ")

    def of(self, layers: int) -> Iterator[int]:
        """The layers that it names, of so many; FormatError where there are fewer."""
        ends = {"first": ((0, self.count - 1),), "last": ((layers - self.count, layers - 1),)}
        for first, last in ends.get(self.kind, self.ranges):
            if first < 0 or last >= layers:
                raise FormatError(
                    f"kv_format: expected layers of 0 to {layers - 1}, got "
                    f"{self.selector}{self.format.name}"
                )
            yield from range(first, last + 1)


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """A default format and exceptions for some layers."""

    default: KVFormat
    rules: tuple[LayerRule, ...] = ()

    @classmethod
    def of(cls, choice: "str | KVFormat | LayerFormats") -> "LayerFormats":
        """From whatever names formats: a text for ``parse``, or a format of one's own for all.

        Raises ValueError for anything else, FormatError for a text that names none.
        """
        if isinstance(choice, LayerFormats):
            return choice
        if isinstance(choice, KVFormat):
            return cls(choice)
        if not isinstance(choice, str):
            raise ValueError(
                f"kv_format: expected a name, a KVFormat or LayerFormats, got {choice!r}"
            )
        return cls.parse(choice)

    @classmethod
    def parse(cls, text: str) -> "LayerFormats":
        """Read the module's notation; FormatError says what was wrong."""
        name, *rules = _parts(text)
        if _is_rule(name):
            raise FormatError(
                f"kv_format: expected a format for all other layers first, such as int4,{text}; "
                f"got {text!r}"
            )
        default = find_format(name)
        found = [_rule(each) for each in rules]
        for kind in ("first", "last"):
            if sum(each.kind == kind for each in found) > 1:
                raise FormatError(f"kv_format: expected one rule for {kind}, got two in {text!r}")
        return cls(default, tuple(found))

    @property
    def name(self) -> str:
        """As it would be written."""
        rules = (f"{each.selector}{each.format.name}" for each in self.rules)
        return ",".join((self.default.name, *rules))

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        """Each format that is named, once."""
        return tuple(dict.fromkeys((self.default, *(each.format for each in self.rules))))

    def places(
        self, layers: int | None = None, among: Sequence[int] | None = None
    ) -> dict[KVFormat, str]:
        """Each format and its layers, in words: "0-3, 20" of ``layers`` layers; None: as named.

        among: of these layers only, ascending.
        """
        if layers is not None:
            chosen = self.of_layers(layers)
            looked_at = range(layers) if among is None else among
            found = {form: [at for at in looked_at if chosen[at] == form] for form in self.formats}
            return {form: layers_in_words(each) for form, each in found.items() if each}
        words = {self.default: ["the others" if self.rules else "all"]}
        for rule in self.rules:
            words.setdefault(rule.format, []).append(rule.words)
        return {form: ", ".join(each) for form, each in words.items()}

    def refuse_static(self) -> None:
        """Raise FormatError for formats whose scales would have to come from outside."""
        for each in self.formats:
            if not each.dynamic:
                raise FormatError(
                    f"kv_format: expected a dynamic format, as no scales are given here; "
                    f"{each.name} is static"
                )

    def of_layers(self, layers: int) -> tuple[KVFormat, ...]:
        """The format of each of ``layers`` layers; FormatError where two rules name one layer."""
        chosen: dict[int, LayerRule] = {}
        for rule in self.rules:
            for layer in rule.of(layers):
                before = chosen.setdefault(layer, rule)
                if before is not rule:
                    raise FormatError(
                        f"kv_format: expected one rule a layer, got two for layer {layer} of "
                        f"{layers}: {before.selector}{before.format.name} and "
                        f"{rule.selector}{rule.format.name}"
                    )
        return tuple(
            chosen[layer].format if layer in chosen else self.default for layer in range(layers)
        )


def split_choices(text: str) -> list[str]:
    """Several choices separated by commas, each with its rules: "int8,int4,first1=int8" are two.

    None of no text; ValueError for commas alone.
    """
    choices: list[str] = []
    for part in filter(None, _parts(text)):
        if choices and _is_rule(part):
            choices[-1] = f"{choices[-1]},{part}"
        else:
            choices.append(part)
    if text.strip() and not choices:
        raise ValueError(f"formats: expected names separated by commas, got {text!r}")
    return choices


def ranges_of(layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[0, 1, 2, 20] -> ((0, 2), (20, 20)); ascending."""
    ends: list[tuple[int, int]] = []
    for layer in layers:
        if ends and layer == ends[-1][1] + 1:
            ends[-1] = (ends[-1][0], layer)
        else:
            ends.append((layer, layer))
    return tuple(ends)


def layers_in_words(layers: Sequence[int]) -> str:
    """[0, 1, 2, 20] -> "0-2, 20"; ascending."""
    return _words(ranges_of(layers), ", ")


def _words(ranges: tuple[tuple[int, int], ...], between: str) -> str:
    return between.join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _is_rule(part: str) -> bool:
    """Whether it says which layers, rightly spelled or not; k= and v= say which half."""
    return "=" in part and re.match(r"[kv]=", part) is None


def _parts(text: str) -> list[str]:
    """The default and the rules: commas inside a list of layers, and between k= and v=, join."""
    parts: list[str] = []
    for piece in (each.strip() for each in text.split(",")):
        last = parts[-1] if parts else ""
        listing = last.startswith("layers=") and ":" not in last
        half = _HALF.fullmatch(last)
        if listing or (half is not None and piece.startswith("v=" if half[1] == "k" else "k=")):
            parts[-1] = f"{last},{piece}"
        else:
            parts.append(piece)
    return parts


def _rule(text: str) -> LayerRule:
    ends, layers = _END.fullmatch(text), _LAYERS.fullmatch(text)
    if ends is not None:
        kind, count, name = ends.groups()
        return LayerRule(kind, find_format(name), count=int(count))
    if layers is None:
        raise FormatError(
            "kv_format: expected rules such as first2=int8, last1=none or layers=0-3,20:int8 "
            f"after the first comma, got {text!r}{_meant(text)}"
        )
    ranges = []
    for word in layers[1].split(","):
        match = _RANGE.fullmatch(word.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise FormatError(
                f"kv_format: expected layers such as 0-3,20 before the colon, got {text!r}"
            )
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return LayerRule("layers", find_format(layers[2]), ranges=tuple(ranges))


def _meant(text: str) -> str:
    """What a rule that is none may have been, for an error."""
    word = re.match(r"([A-Za-z]+)([^=]*=)", text)
    if word is None:
        return ""
    near = get_close_matches(word[1].lower(), _KINDS, n=1)
    if not near or near[0] == word[1]:
        return ""
    return f" (did you mean {near[0]}{text[len(word[1]) :]}?)"
