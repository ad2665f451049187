"""`quantpage formats`: every format, generated from FORMATS."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from quantpage import console
from quantpage.cli.options import AsJson, HeadDim, KVHeads, Layers, ModelOrNone
from quantpage.errors import FormatError

if TYPE_CHECKING:
    from quantpage.formats import KVFormat, QuantSpec

HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Row:
    """One format in words."""

    format: str
    codes: str
    scale_for_each: str
    scales: str
    bits_per_value: str
    bytes_per_token: int | None
    """Of all layers without a window; None: no model is known."""
    exact_pages: int
    """Pages a request that are kept in 16 bits beside the codes."""
    also_called: tuple[str, ...]
    summary: str


def command(
    model: ModelOrNone = None,
    layers: Layers = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    as_json: AsJson = False,
) -> None:
    """List the cache formats: bits, what shares a scale, static or dynamic, bytes a token.

    Bytes a token are those of --model, or of --layers, --kv-heads and --head-dim. --head-dim alone
    gives the bits a value.
    """
    from quantpage.cli.shapes import read_counted
    from quantpage.formats import FORMATS
    from quantpage.formats.per_layer import LayerFormats

    counted = None
    if model is not None or layers is not None or kv_heads is not None:
        counted = read_counted(model, layers, kv_heads, head_dim, tp=1)
        head_dim = counted.head_dim
    width = HEAD_DIM if head_dim is None else head_dim
    rows, refused = [], {}
    for name, each in FORMATS.items():
        try:
            size = None
            if counted is not None:
                plans = counted.plans(LayerFormats(each), 64)
                size = sum(e.layout.bytes_per_token() for e in plans if not e.reach.limited)
            rows.append(_row(each, width, size))
        except FormatError as error:
            refused[name] = str(error)
    if as_json:
        console.print_json(
            {"head_dim": width, "formats": [asdict(row) for row in rows], "refused": refused}
        )
        return
    about = f"head_dim {width}" if counted is None else counted.about
    _print(rows, refused, about, counted is not None)


def _row(each: "KVFormat", head_dim: int, size: int | None) -> Row:
    from quantpage.formats import ALIASES

    codes, owner, when, bits = (_of_both(each, describe, head_dim) for describe in _COLUMNS)
    aliases = tuple(alias for alias, target in ALIASES.items() if target == each.name)
    kept = 0 if each.exact_pages is None else each.exact_pages.kept_pages
    return Row(each.name, codes, owner, when, bits, size, kept, aliases, each.summary)


def _print(rows: list[Row], refused: dict[str, str], about: str, sized: bool) -> None:
    from quantpage.formats.table import NEAR8

    console.print_line(about)
    columns = ["format", "codes", "a scale\nfor each", "scales", "bits a\nvalue"]
    table = console.new_table(*columns, *(["bytes a\ntoken"] if sized else []), left=4)
    for row in rows:
        cells = [row.format, row.codes, row.scale_for_each, row.scales, row.bits_per_value]
        table.add_row(*cells, *([f"{row.bytes_per_token:,}"] if sized else []))
    console.OUT.print(table)
    for name, reason in refused.items():
        console.print_line(f"{name}: not for this head_dim. {reason}")
    exact = [row for row in rows if row.exact_pages]
    if exact:
        console.print_line(
            f"{', '.join(row.format for row in exact)}: a query sees the first page, its own and "
            f"the one before unquantized; up to {max(row.exact_pages for row in exact)} pages a "
            f"request are kept so, in 16 bits; with {NEAR8} after the name in int8."
        )
    for row in rows:
        if row.also_called:
            console.print_line(f"{row.format}: also called {', '.join(row.also_called)}.")


def _of_both(
    kv_format: "KVFormat", describe: "Callable[[QuantSpec, int], str]", head_dim: int
) -> str:
    key, value = describe(kv_format.key, head_dim), describe(kv_format.value, head_dim)
    return key if key == value else f"K {key}, V {value}"


def _codes(spec: "QuantSpec", head_dim: int) -> str:
    words = [spec.code.name if spec.quantized else "the model's own"]
    if spec.zero_point:
        words.append("with zero")
    if spec.rotation != "none":
        words.append("rotated")
    return " ".join(words)


def _owner(spec: "QuantSpec", head_dim: int) -> str:
    if not spec.quantized:
        return "-"
    granularity = spec.granularity
    if not granularity.per_head:
        return "tensor"
    if granularity.group == 1:
        return "channel"
    token = "token, " if spec.dynamic else ""
    if granularity.groups(head_dim) == 1:
        return f"{token}kv_head"
    return f"{token}{granularity.group} channels"


def _when(spec: "QuantSpec", head_dim: int) -> str:
    return "-" if not spec.quantized else "dynamic" if spec.dynamic else "static"


def _bits(spec: "QuantSpec", head_dim: int) -> str:
    return f"{spec.bits_per_value(head_dim):.4g}"


_COLUMNS = (_codes, _owner, _when, _bits)
