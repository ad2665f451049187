"""`quantpage capacity`: how many tokens and requests fit in a memory, per format."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import TP, AsJson, HeadDim, KVHeads, Layers, ModelOrNone, PageSize
from quantpage.errors import FormatError

if TYPE_CHECKING:
    from quantpage.cache.sizes import LayerPlan
    from quantpage.cli.shapes import Counted

LONGEST = (1 << 31) - 1
"""Tokens of a request: positions are int32."""

_UNITS = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Row:
    """What one format takes, and how much of it fits."""

    format: str
    bytes_per_token: int
    """That one more token takes for good: of layers without a window."""
    request_bytes: int
    """That a request of the context holds between steps, states of other layers counted."""
    sixteen_bit_bytes: int
    """What Transformers' own cache holds of it, the same states counted."""
    prompt_bytes: int
    """The most that its prompt takes while it is computed."""
    requests: int
    """Of the context, of which one is still computing its prompt."""
    longest: int
    """Tokens of one request that fills the memory."""


def command(
    memory: Annotated[str, typer.Option(help="Memory of one device, such as 40GiB or 800MB.")],
    model: ModelOrNone = None,
    layers: Layers = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    context: Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens of one request.")] = 8192,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to count, comma separated; int8,int4,first2=int8 are two, the second by "
            "layer. Default: all."
        ),
    ] = "",
    tp: TP = 1,
    weights: Annotated[
        str, typer.Option(help="Take the weights off the memory first: bf16, int8 or none.")
    ] = "none",
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens computed in a step; default: the whole prompt."),
    ] = None,
    page_size: PageSize = 64,
    as_json: AsJson = False,
) -> None:
    """Count the tokens and requests that fit in a memory, format by format.

    Counted from what attach would allocate: windows, latent rows, states of other layers, pages
    kept exact. A model that attach refuses is refused.
    """
    from quantpage.cli.shapes import read_counted
    from quantpage.formats import FORMATS
    from quantpage.formats.per_layer import LayerFormats, split_choices

    budget = parse_bytes(memory)
    counted = read_counted(model, layers, kv_heads, head_dim, tp)
    taken = _weights(counted, weights, tp)
    if taken >= budget:
        raise ValueError(
            f"memory: expected more than the weights ({taken / 2**30:.4g} GiB a device in "
            f"{weights}), got {memory}"
        )
    rows, refused = [], {}
    for name in split_choices(formats) or FORMATS:
        try:
            plans = counted.plans(LayerFormats.parse(name), page_size)
        except FormatError as error:
            if formats:
                raise
            refused[name] = str(error)
            continue
        rows.append(row_of(name, plans, counted.state_bytes, budget - taken, context, chunk))
    if as_json:
        console.print_json(
            {
                "memory_bytes": budget,
                "weight_bytes": taken,
                "tp": tp,
                "context": context,
                "chunk": chunk,
                "page_size": page_size,
                "cache": counted.about,
                "state_bytes": counted.states,
                "rows": [asdict(row) for row in rows],
                "refused": refused,
            }
        )
        return
    _print(rows, refused, counted, context)
    _print_base(counted, budget, taken, weights, tp)


def row_of(
    name: str,
    plans: "Sequence[LayerPlan]",
    state_bytes: int,
    budget: int,
    context: int,
    chunk: int | None,
) -> Row:
    """One format, of which layers have these ``plans``, in ``budget`` bytes."""
    from quantpage.cache.sizes import held_bytes, longest_in, prompt_bytes, unquantized_bytes

    held = held_bytes(plans, context) + state_bytes
    peak = prompt_bytes(plans, context, chunk=chunk) + state_bytes
    return Row(
        format=name,
        bytes_per_token=sum(e.layout.bytes_per_token() for e in plans if not e.reach.limited),
        request_bytes=held,
        sixteen_bit_bytes=unquantized_bytes(plans, context) + state_bytes,
        prompt_bytes=peak,
        # All but one are held, and that one computes its prompt.
        requests=(budget - peak) // held + 1 if peak <= budget else 0,
        longest=longest_in(plans, budget - state_bytes),
    )


def parse_bytes(text: str) -> int:
    """'40GiB' -> 42949672960; ValueError says what was expected."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    # 40G and 40Gi are read as 40GB and 40GiB.
    unit = match.group(2).upper().removesuffix("B") + "B" if match and match.group(2) else ""
    size = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 1:
        raise ValueError(f"memory: expected a number and a unit such as 40GiB, got {text!r}")
    return size


def _weights(counted: "Counted", weights: str, tp: int) -> int:
    if weights not in ("bf16", "int8", "none"):
        raise ValueError(f"weights: expected bf16, int8 or none; got {weights!r}")
    if weights == "none":
        return 0
    if counted.config is None:
        raise ValueError("weights: expected none without --model, as no weights are known")
    from quantpage.integrations.hf_transformers.loading.checkpoint import errors_in_one_sentence
    from quantpage.integrations.hf_transformers.sizes import weight_bytes

    with console.status("counting the weights"), errors_in_one_sentence("the model"):
        return weight_bytes(counted.config, weights, tp)


def _print(rows: list[Row], refused: dict[str, str], counted: "Counted", context: int) -> None:
    console.print_line(counted.about)
    table = console.new_table(
        "format",
        "bytes a\ntoken",
        f"a request\nof {context:,}",
        "of 16\nbit",
        "its\nprompt",
        "requests",
        "longest\nrequest",
    )
    for row in rows:
        table.add_row(
            row.format,
            f"{row.bytes_per_token:,}",
            console.in_units(row.request_bytes),
            # A window of one token is kept by nobody.
            f"{row.request_bytes / row.sixteen_bit_bytes:.1%}" if row.sixteen_bit_bytes else "",
            console.in_units(row.prompt_bytes),
            f"{row.requests:,}",
            f"{row.longest:,}" if row.longest < 1 << 40 else "any",
        )
    console.OUT.print(table)
    for name, reason in refused.items():
        console.print_line(f"{name}: not for this model. {reason}")


def _print_base(counted: "Counted", budget: int, taken: int, weights: str, tp: int) -> None:
    where = f"on each of {tp} devices" if tp > 1 else "on one device"
    console.print_line(
        f"{console.in_units(budget - taken)} for the cache {where}"
        + (f", beside {console.in_units(taken)} of weights in {weights}" if taken else "")
        + ". of 16 bit: against Transformers' own cache. its prompt: the most that one request "
        "takes while its prompt is computed; all other requests are held meanwhile."
    )
    for kind, size in counted.states.items():
        console.print_line(
            f"{kind}: {console.in_units(size)} of states a request, not quantized, counted"
        )
