"""`quantpage explain`: the device, what runs for each op and format, and every refusal once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from quantpage import console, cpu_core
from quantpage.cli.options import AsJson, Device
from quantpage.explain import (
    OPS,
    Choice,
    candidates_of,
    distinct_refusals,
    example_call,
    explain,
    support_matrix,
)
from quantpage.formats import FORMATS, KVFormat, find_format
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import DeviceInfo, device_info, find_device
from quantpage.ops.dispatch import Call

MASKS = ("causal", "full", "interval", "asked")


def command(
    kv_format: Annotated[
        str | None, typer.Option(help="Only this format, or those of a choice a layer.")
    ] = None,
    device: Device = "auto",
    model: Annotated[
        str | None, typer.Option(help="Model folder: its heads; default: those of an 8B Llama.")
    ] = None,
    mask: Annotated[str, typer.Option(help="causal, full, interval or asked.")] = "causal",
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FORMAT OP",
            help="What each candidate says: int8 decode. Ops: rope_write, prefill, decode, gather.",
        ),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Print the support matrix (docs/support.md) and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which implementation serves each op and format here, and why the others refused."""
    if matrix:
        print(support_matrix())
        return
    if mask not in MASKS:
        raise ValueError(f"mask: expected causal, full, interval or asked, got {mask!r}")
    info = device_info(find_device(device))
    call, layers = example_call(info, FORMATS["none"], mask), None
    if model is not None:
        from quantpage.integrations.hf_transformers.model import load_config
        from quantpage.integrations.hf_transformers.sizes import cache_shape, call_of

        config = load_config(model)
        call, layers = call_of(config, call), cache_shape(config).count
    if why is not None:
        _print_why(replace(call, format=find_format(why[0])), why[1], as_json)
        return
    formats: Sequence[KVFormat] = list(FORMATS.values())
    places: dict[str, str] = {}
    if kv_format is not None:
        chosen = LayerFormats.parse(kv_format)
        named = chosen.places(layers)
        formats = list(named)
        places = {each.name: words for each, words in named.items()} if chosen.rules else {}
    choices = [choice for each in formats for choice in explain(replace(call, format=each))]
    if as_json:
        console.print_json(_as_data(call, choices, places))
        return
    console.print_facts(_environment(info))
    console.OUT.print(f"\n{_heads_in_words(call)}")
    _print_table(choices, places)
    _print_refusals(choices)


def _environment(info: DeviceInfo) -> dict[str, str]:
    """What decides who runs, by name."""
    capability = (
        "" if info.capability is None else ", compute capability {}.{}".format(*info.capability)
    )
    unit = "threads" if info.kind == "cpu" else "multiprocessors"
    found = cpu_core.find_core()
    if found is None:
        core, isa = f"none: {cpu_core.absence()}", "-"
    else:
        core, isa = "yes", f"{cpu_core.ISAS[found.isa]} (of {', '.join(cpu_core.ISAS)})"
    return {
        "device": f"{info.name} ({info.kind}{capability}, {info.processors} {unit})",
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


def _print_table(choices: Sequence[Choice], places: Mapping[str, str]) -> None:
    columns = ("format", *(["layers"] if places else []), *OPS)
    table = console.new_table(*columns, left=len(columns))
    for name in dict.fromkeys(each.format for each in choices):
        chosen = {each.op: each.chosen or "nothing" for each in choices if each.format == name}
        table.add_row(name, *([places[name]] if places else []), *(chosen[op] for op in OPS))
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


def _print_why(call: Call, op: str, as_json: bool) -> None:
    said = candidates_of(call, op)
    chosen = next((who for who, reasons in said if not reasons), None)
    if as_json:
        candidates = [{"implementation": who, "refusals": reasons} for who, reasons in said]
        console.print_json(
            {"format": call.format.name, "op": op, "chosen": chosen, "candidates": candidates}
        )
        return
    console.OUT.print(f"{call.format.name}, {op}, {_heads_in_words(call)}; in order of preference:")
    for who, reasons in said:
        serves = "runs" if who == chosen else "could run"
        console.print_line(f"  {who}: {' '.join(reasons) or serves}")


def _as_data(call: Call, choices: Sequence[Choice], places: Mapping[str, str]) -> dict[str, Any]:
    return {
        "environment": _environment(call.device),
        "call": {
            "dtype": str(call.dtype).removeprefix("torch."),
            "q_heads": call.q_heads,
            "kv_heads": call.kv_heads,
            "head_dim": call.head_dim,
            "value_head_dim": call.value_head_dim,
            "latent": call.latent,
            "page_size": call.page_size,
            "mask": call.mask,
        },
        "layers": dict(places),
        "choices": [asdict(choice) for choice in choices],
    }
