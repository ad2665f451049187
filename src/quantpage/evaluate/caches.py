"""What is compared: our formats, and the quantized caches that Transformers has."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

from quantpage.evaluate.score import Attaching
from quantpage.formats import FORMATS, KVFormat
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.keys.calibration import Calibration
from quantpage.integrations.hf_transformers.keys.key_maps import check_calibration
from quantpage.integrations.hf_transformers.loading.model import model_shape
from quantpage.integrations.hf_transformers.sizes import cache_shape
from quantpage.ops.attend.params import NEAR_PAGES


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table."""

    name: str
    """Of a choice of formats, or 'hf-' and the backend and bits of a cache of Transformers."""
    bits_per_value: float
    """In the body: codes with their share of scales and zeros; 16 for unquantized."""
    bytes_per_token: float
    """Of all layers, in the body, beside a 16-bit model."""
    sixteen_bit_tokens: str
    """How many tokens a request keeps in 16 bits beside the body; 'prefill': the prompt's own
    forward sees it unquantized."""
    attaching: Attaching
    calibration: str = "none"
    """Where key maps come from."""
    codes_from: int = 0
    """The first token whose prediction reads codes: those before see exact pages alone."""


def ours(
    config: Any,
    choice: str | KVFormat | LayerFormats,
    page_size: int,
    calibration: str = "auto",
) -> Candidate:
    """A row for one of our formats, or for one a layer."""
    formats = LayerFormats.of(choice)
    shape = replace(cache_shape(config), dtype=torch.bfloat16)
    layouts = [plan.layout for plan in shape.layers(formats, page_size)]
    bits, numbers = 0.0, 0
    for each in layouts:
        for spec, width in ((each.format.key, each.head_dim), (each.format.value, each.v_dim)):
            bits += spec.bits_per_value(width) * width * each.kv_heads
            numbers += width * each.kv_heads
    exact = (each.format.exact_pages for each in layouts)
    kept = max(0 if each is None else each.kept_pages for each in exact)
    near = {each.format.near.name for each in layouts if each.format.near is not None}
    words = f"<= {kept * page_size}" if kept else "0"
    if near:
        words += f" in {' or '.join(sorted(near))}"

    coded = [each.format for each in layouts if each.format.quantized]
    hidden = bool(coded) and all(each.exact_pages is not None for each in coded)

    return Candidate(
        name=choice if isinstance(choice, str) else formats.name,
        bits_per_value=bits / numbers,
        bytes_per_token=sum(each.bytes_per_token() for each in layouts),
        sixteen_bit_tokens=words if any(each.format.quantized for each in layouts) else "all",
        attaching=pages(formats, page_size, calibration),
        calibration=Path(calibration).name,
        # Page 0 is exact for all; of page 3 pages 2 and 3 are near, and page 1 is read as codes.
        codes_from=(2 + NEAR_PAGES) * page_size if hidden else 0,
    )


def pages(formats: LayerFormats, page_size: int, calibration: str | None) -> Attaching:
    """Our cache in these formats; calibration: as ``attach`` takes it."""

    @contextmanager
    def attaching(model: Any) -> Iterator[Callable[[], Any]]:
        with attach(model, formats, page_size=page_size, calibration=calibration) as attached:
            yield attached.new_cache

    return attaching


@dataclass(frozen=True, slots=True)
class Peer:
    """A quantized cache of Transformers."""

    backend: str
    bits: int
    package: str
    group: int = 64
    residual: int = 128


PEERS: dict[str, Peer] = {
    "hf-quanto4": Peer("quanto", 4, "optimum.quanto"),
    "hf-hqq4": Peer("hqq", 4, "hqq"),
    "hf-hqq8": Peer("hqq", 8, "hqq"),
}
"""Rows to compare with. Their prompt's forward is unquantized, and so are up to 128 recent
tokens: both are errors that ours makes and they do not."""


def peer(config: Any, name: str) -> Candidate:
    """A row for one of Transformers' quantized caches, as its documentation sets it up."""
    found, shape = PEERS[name], model_shape(config)
    if not _installed(found.package):
        raise ValueError(
            f"formats: {name} needs the package {found.package.replace('.', '-')}, which is not "
            "installed"
        )
    # A scale and a zero in 16 bits for each group.
    bits = found.bits + 2 * 16 / found.group

    def new_cache() -> Any:
        return QuantizedCache(
            backend=found.backend,
            config=config,
            nbits=found.bits,
            axis_key=0 if found.backend == "quanto" else 1,
            axis_value=0 if found.backend == "quanto" else 1,
            q_group_size=found.group,
            residual_length=found.residual,
        )

    @contextmanager
    def attaching(model: Any) -> Iterator[Callable[[], Any]]:
        yield new_cache

    return Candidate(
        name=name,
        bits_per_value=bits,
        bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * bits / 8,
        sixteen_bit_tokens=f"prefill, <= {found.residual}",
        attaching=attaching,
    )


@contextmanager
def unquantized(model: Any) -> Iterator[Callable[[], Any]]:
    """Transformers' own cache and attention: what every row is compared with."""
    yield lambda: DynamicCache(config=model.config)


def find_candidates(
    config: Any,
    choices: Sequence[str | KVFormat | LayerFormats],
    page_size: int,
    calibration: str = "auto",
) -> list[Candidate]:
    """A row for each choice: a name of PEERS, or whatever LayerFormats takes.

    A file of a calibration is read, so that a broken one, or one for other formats, is told before
    a model is loaded.
    """
    asked = calibration in ("auto", "none") or Path(calibration).is_dir()
    known = None if asked else Calibration.load(calibration)
    found = []
    for choice in choices:
        if isinstance(choice, str) and choice in PEERS:
            found.append(peer(config, choice))
            continue
        formats = LayerFormats.of(choice)
        if known is None:
            # 'auto' and a checkpoint's folder are asked for the scales of static formats.
            check_calibration(calibration, formats, config.name_or_path or None)
        else:
            of_layers = formats.of_layers(model_shape(config).layers)
            known.maps(of_layers, calibration)
            known.scales(of_layers, calibration)
        found.append(ours(config, choice, page_size, calibration))
    return found


def default_names() -> list[str]:
    """Every dynamic format, and the peers that are installed."""
    dynamic = [name for name, each in FORMATS.items() if each.dynamic]
    return dynamic + [name for name, each in PEERS.items() if _installed(each.package)]


def _installed(package: str) -> bool:
    root = package.split(".")[0]
    return find_spec(root) is not None and find_spec(package) is not None
