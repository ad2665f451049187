"""What `quantpage explain` prints: the device, what runs for each op and format, and every refusal
once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quantpage import console, cpu_core
from quantpage.explain import (
    OPS,
    Choice,
    candidates_of,
    distinct_refusals,
    example_call,
    explain,
    support_matrix,
)
from quantpage.formats import FORMATS, KVFormat
from quantpage.formats.per_layer import LayerFormats, layers_in_words
from quantpage.hardware import DeviceInfo, device_info, find_device
from quantpage.ops.dispatch import Call

MASKS = ("causal", "full", "interval", "asked")


@dataclass(frozen=True, slots=True)
class ExplainRequest:
    """What `quantpage explain` was asked for."""

    kv_format: str | None = None
    device: str = "auto"
    model: str | None = None
    mask: str = "causal"
    why: tuple[str, str] | None = None
    matrix: bool = False
    as_json: bool = False


def say(asked: ExplainRequest) -> None:
    """Print it; ValueError for what cannot be asked."""
    if asked.matrix:
        print(support_matrix())
        return
    if asked.mask not in MASKS:
        raise ValueError(f"mask: expected causal, full, interval or asked, got {asked.mask!r}")
    info = device_info(find_device(asked.device))
    call = example_call(info, FORMATS["none"], asked.mask)
    if asked.why is not None:
        if asked.kv_format is not None:
            raise ValueError(f"why: expected no --kv-format beside it, got {asked.kv_format}")
        _print_why(_served(call, asked.model, asked.why[0]), asked.why[1], asked.as_json)
        return
    served = _served(call, asked.model, asked.kv_format)
    if asked.as_json:
        console.print_json(_as_data(_environment(info), served))
        return
    console.print_facts(_environment(info))
    for each in served:
        console.OUT.print(f"\n{each.in_words}")
        _print_table(each)
    _print_refusals([choice for each in served for choice in each.choices()])


@dataclass(frozen=True, slots=True)
class _Served:
    """Layers with heads of one kind, and their formats."""

    call: Call
    layers: str
    """In words; empty: all."""
    places: Mapping[KVFormat, str]
    """Each format and its layers, in words; empty: all of these."""

    @property
    def in_words(self) -> str:
        """The heads, and which layers have them."""
        return _heads_in_words(self.call) + (f"; layers: {self.layers}" if self.layers else "")

    def calls(self) -> list[Call]:
        """For each format."""
        return [replace(self.call, format=each) for each in self.places]

    def choices(self) -> list[Choice]:
        """Of every format and op."""
        return [choice for each in self.calls() for choice in explain(each)]


def _served(call: Call, model: str | None, kv_format: str | None) -> list[_Served]:
    """Every kind of heads of a model, or those of ``call``; None: every format."""
    chosen = None if kv_format is None else LayerFormats.parse(kv_format)
    if model is None:
        return [_Served(call, "", _places(chosen))]
    from quantpage.integrations.hf_transformers.loading.model import load_config
    from quantpage.integrations.hf_transformers.sizes import cache_shape, calls_of

    config = load_config(model)
    count, calls = cache_shape(config).count, calls_of(config, call)
    return [
        _Served(
            each,
            "" if len(calls) == 1 else layers_in_words(layers),
            _places(chosen, count, layers),
        )
        for each, layers in calls.items()
    ]


def _places(
    chosen: LayerFormats | None, count: int | None = None, layers: Sequence[int] | None = None
) -> dict[KVFormat, str]:
    if chosen is None:
        return dict.fromkeys(FORMATS.values(), "")
    places = chosen.places(count, layers)
    return places if chosen.rules else dict.fromkeys(places, "")


def _environment(info: DeviceInfo) -> dict[str, str]:
    """What decides who runs, by name."""
    capability = (
        "" if info.capability is None else ", compute capability {}.{}".format(*info.capability)
    )
    size = console.counted(info.processors, "thread" if info.kind == "cpu" else "multiprocessor")
    found = cpu_core.find_core()
    if found is None:
        core, isa = f"none: {cpu_core.absence()}", "-"
    else:
        core, isa = "yes", f"{cpu_core.ISAS[found.isa]} (of {', '.join(cpu_core.ISAS)})"
    return {
        "device": f"{info.name} ({info.kind}{capability}, {size})",
        "compiled core": core,
        "instruction set": isa,
        "triton": _version("triton"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _heads_in_words(call: Call) -> str:
    dtype = str(call.dtype).removeprefix("torch.")
    value = "" if call.value_head_dim == call.head_dim else f" (values {call.value_head_dim})"
    cached = f"{call.kv_heads} kv_heads, head_dim {call.head_dim}{value}"
    if call.latent:
        cached = f"latent rows of {call.head_dim} and {call.value_head_dim} rotary channels"
    return (
        f"{call.q_heads} query heads, {cached}, page_size {call.page_size}, {dtype}, "
        f"{call.mask} mask"
    )


def _print_table(served: _Served) -> None:
    placed = any(served.places.values())
    table = console.new_table("format", *(["layers"] if placed else []), *OPS, left=2 + len(OPS))
    for kv_format, place in served.places.items():
        said = {each.op: each for each in explain(replace(served.call, format=kv_format))}
        chosen = (said[op].chosen or "nothing" for op in OPS)
        table.add_row(kv_format.name, *([place] if placed else []), *chosen)
    console.OUT.print(table)


def _print_refusals(choices: Sequence[Choice]) -> None:
    every = list(dict.fromkeys(each.format for each in choices))
    refusals = distinct_refusals(choices)
    if refusals:
        console.OUT.print("Who refused, and why:\n")
    for refusal in refusals:
        console.print_line(refusal.sentence)
        for who, ops, formats in refusal.cases:
            names = "every format" if len(formats) == len(every) > 1 else ", ".join(formats)
            short = ", ".join(op.split()[-1] for op in ops)
            console.print_line(f"  {_together(who)}: {short}; {names}")


def _together(who: Sequence[str]) -> str:
    """'gluon (decode)', 'triton (decode)' -> 'gluon, triton (decode)': what is alike once."""
    rooms: dict[str, list[str]] = {}
    for each in who:
        name, _, room = each.removesuffix(")").partition(" (")
        rooms.setdefault(name, []).append(room)
    names: dict[str, list[str]] = {}
    for name, of in rooms.items():
        names.setdefault(", ".join(filter(None, of)), []).append(name)
    return ", ".join(", ".join(alike) + (f" ({of})" if of else "") for of, alike in names.items())


def _print_why(served: Sequence[_Served], op: str, as_json: bool) -> None:
    asked = []
    for each in served:
        for call, place in zip(each.calls(), each.places.values(), strict=True):
            said = candidates_of(call, op)
            chosen = next((who for who, reasons in said if not reasons), None)
            asked.append((call, place or each.layers, chosen, said))
    if as_json:
        console.print_json(
            [
                {
                    "format": call.format.name,
                    "layers": layers,
                    "call": _call_as_data(call),
                    "op": op,
                    "chosen": chosen,
                    "candidates": [
                        {"implementation": who, "refusals": reasons} for who, reasons in said
                    ],
                }
                for call, layers, chosen, said in asked
            ]
        )
        return
    for at, (call, layers, chosen, said) in enumerate(asked):
        if at:
            console.OUT.print()
        of = f"layers: {layers}; " if layers else ""
        console.OUT.print(
            f"{call.format.name}, {op}, {_heads_in_words(call)}; {of}in order of preference:"
        )
        for who, reasons in said:
            serves = "runs" if who == chosen else "could run"
            console.print_line(f"  {who}: {' '.join(reasons) or serves}")


def _as_data(environment: Mapping[str, str], served: Sequence[_Served]) -> dict[str, Any]:
    return {
        "environment": dict(environment),
        "kinds": [
            {
                "layers": each.layers,
                "call": _call_as_data(each.call),
                "formats": {form.name: place for form, place in each.places.items()},
                "choices": [asdict(choice) for choice in each.choices()],
            }
            for each in served
        ],
    }


def _call_as_data(call: Call) -> dict[str, Any]:
    return {
        "dtype": str(call.dtype).removeprefix("torch."),
        "q_heads": call.q_heads,
        "kv_heads": call.kv_heads,
        "head_dim": call.head_dim,
        "value_head_dim": call.value_head_dim,
        "latent": call.latent,
        "page_size": call.page_size,
        "mask": call.mask,
    }
