"""vLLM's --kv-cache-dtype -> a format of ours: names, bytes, block sizes, refusals.

Imports no vLLM.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from quantpage.cache import PAGE_SIZES
from quantpage.cache.layout import CacheLayout
from quantpage.errors import FormatError, NoImplementation
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec, find_format
from quantpage.formats.table import NEAR8

_FP8_TENSOR = QuantSpec(CODES["fp8"], Granularity(per_head=False), dynamic=False)
FP8 = KVFormat("fp8_tensor", _FP8_TENSOR, _FP8_TENSOR, None, "one given scale a tensor")
"""vLLM's "fp8": a scale for all keys of a layer and one for its values, from the checkpoint."""


def _served(form: KVFormat) -> bool:
    """Given scales a head or channel are in no checkpoint that vLLM reads."""
    return form.quantized and form.dynamic


def _near8(form: KVFormat) -> bool:
    """Whether exact pages in int8 are less than 16 bits and more than its codes."""
    codes = form.key.code, form.value.code
    return form.exact_pages is not None and min(code.bits for code in codes) < 8


_FORMATS = [name for name, form in FORMATS.items() if _served(form)]
SERVED = (*_FORMATS, *(f"{name}{NEAR8}" for name in _FORMATS if _near8(FORMATS[name])))
"""Formats that a vLLM serves whole models in, by our names."""
OWN_NAMES = tuple(f"quantpage_{name}" for name in SERVED)
"""Names of --kv-cache-dtype that a vLLM with names of plugins' own takes."""

CHOOSABLE = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
"""vLLM's names, beside each of which --additional-config may choose another format."""

FORMAT = "quantpage"
"""The key of --additional-config that names a format."""
CALIBRATION = "quantpage_calibration"
"""The one that names a file of key maps."""
WARM_UP = "quantpage_warm_up"
"""And the one that says whether kernels are compiled at the start (``warm_up``)."""

NAMES: dict[str, KVFormat] = {
    **dict.fromkeys(("auto", "float16", "bfloat16"), FORMATS["none"]),
    **dict.fromkeys(("fp8", "fp8_e4m3"), FP8),
    **{name: find_format(name) for name in CHOOSABLE},
    **{name: find_format(own) for name, own in zip(OWN_NAMES, SERVED, strict=True)},
}
"""All names of --kv-cache-dtype that are served."""

EXACT_PAGES = (64, 32, 16)
"""Tokens of an exact page, the best first: longer pages keep more of the end of a context exact."""

LONG_CHUNK = 256
"""A step of more tokens of a request keeps only those exact pages that later steps read: it runs in
pages of its own (``working``). Both vLLM's scheduler and its workers go by this."""


def format_of(
    name: str, additional: Mapping[str, Any] | None = None, own_names: bool = True
) -> KVFormat:
    """The format of layers whose --kv-cache-dtype is ``name``.

    additional: --additional-config; its "quantpage" names a format where vLLM has no name for it,
    in the place of a *_per_token_head name. (Layers that --kv-cache-dtype-skip-layers leaves out
    have another name.) own_names: whether this vLLM takes OWN_NAMES. Raises ValueError for what
    cannot be served.
    """
    if name not in NAMES:
        taken = [each for each in NAMES if own_names or each not in OWN_NAMES]
        raise ValueError(f"--kv-cache-dtype: expected one of {', '.join(taken)}; got {name!r}")
    wanted = (additional or {}).get(FORMAT)
    if wanted is None or name not in CHOOSABLE:
        return NAMES[name]
    form = None
    with suppress(FormatError):
        form = find_format(str(wanted))
    if form is None or not _served(form):
        raise FormatError(
            f"--additional-config {FORMAT}: expected one of {', '.join(SERVED)}; got {wanted!r}"
        )
    return form


def check_additional(additional: Mapping[str, Any] | None, name: str) -> None:
    """ValueError for what --additional-config says of us and nobody would follow.

    name: the --kv-cache-dtype of all layers.
    """
    given = {key: each for key, each in (additional or {}).items() if key.startswith(FORMAT)}
    known = (FORMAT, CALIBRATION, WARM_UP)
    for key in given:
        if key not in known:
            raise ValueError(f"--additional-config: expected {', '.join(known)}; got {key!r}")
    if FORMAT in given and name not in CHOOSABLE:
        raise ValueError(
            f"--additional-config {FORMAT}: expected --kv-cache-dtype {' or '.join(CHOOSABLE)} "
            f"beside it, got {name}"
        )
    path = given.get(CALIBRATION, "")
    if not isinstance(path, str):
        raise ValueError(f"--additional-config {CALIBRATION}: expected a file, got {path!r}")
    wants_warm_up(given)


def layout_of(
    form: KVFormat, widths: tuple[int, int], dtype: torch.dtype, page: int = 64
) -> CacheLayout:
    """Pages of one kv_head; widths: of a key, of a value."""
    return CacheLayout(1, widths[0], form, page, dtype, widths[1])


def token_bytes(form: KVFormat, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of one token and kv_head, its share of scales counted."""
    return layout_of(form, widths, dtype).bytes_per_token()


def exact_token_bytes(form: KVFormat, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """The same in an exact page: 16 bits a number, or int8 codes and their scales."""
    near = layout_of(form, widths, dtype).near
    assert near is not None
    return near.bytes_per_token()


def wants_warm_up(additional: Mapping[str, Any] | None) -> bool:
    """What --additional-config says of WARM_UP, true if nothing; ValueError for what is neither."""
    wanted = (additional or {}).get(WARM_UP, True)
    if not isinstance(wanted, bool):
        raise ValueError(f"--additional-config {WARM_UP}: expected true or false, got {wanted!r}")
    return wanted


def check_block_size(block_size: int) -> None:
    """ValueError where no page of ours divides a block of vLLM's.

    vLLM asks too, but when its server takes its engine for started, and waits ten minutes then.
    """
    if block_size % min(PAGE_SIZES):
        raise ValueError(
            f"--block-size: expected a multiple of {min(PAGE_SIZES)}, got {block_size}"
        )


def exact_page(form: KVFormat, block_size: int, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Tokens of an exact page: the most that fit into a block of codes.

    Both kinds of pages come from vLLM's one pool, whose blocks all have the same bytes. Raises
    ValueError where ``block_size`` is too small or no multiple of a page.
    """
    exact_bytes = exact_token_bytes(form, widths, dtype)
    coded = token_bytes(form, widths, dtype)
    room = block_size * coded
    for page in EXACT_PAGES:
        if page * exact_bytes <= room and block_size % page == 0:
            return page
    small = EXACT_PAGES[-1]
    least = -(-small * exact_bytes // (coded * small)) * small
    raise ValueError(
        f"--block-size: {form.name} keeps exact pages of {small} tokens or more in blocks of "
        f"codes, expected a multiple of {small} from {least} on, got {block_size}"
    )


def refuse_layer(
    form: KVFormat,
    *,
    alibi: bool = False,
    attn_type: str = "decoder",
    shared: bool = False,
    unknown: Sequence[str] = (),
    skips: bool = False,
    one_group: bool = False,
    drafts: bool = False,
) -> None:
    """NoImplementation, with every reason, for a layer of vLLM's that cannot be served.

    attn_type: vLLM's word. shared: reads another layer's cache. unknown: names of arguments of
    attention that are not known here. skips: other layers are left out of the format. one_group:
    all layers have one table of blocks. drafts: of another model's layers, beside this one's.
    """
    said = []
    if alibi:
        said.append("ALiBi is not served.")
    if attn_type != "decoder":
        said.append(f"decoder layers are served, got a layer of type {attn_type}.")
    if unknown:
        said.append(f"attention with {', '.join(sorted(unknown))} is not served.")
    if form.exact_pages is not None and shared:
        said.append(
            f"{form.name} keeps exact pages, which layers that read another layer's cache do not "
            "find; int8 and fp8 serve them."
        )
    if form.exact_pages is not None and skips:
        said.append(
            f"{form.name} keeps exact pages, for which blocks are cut into pages, and blocks as "
            "large as those of layers that --kv-cache-dtype-skip-layers leaves out cannot be; int8 "
            "and fp8 serve them."
        )
    if form.exact_pages is not None and one_group:
        said.append(
            f"{form.name} keeps exact pages, which are a cache group of their own, and vLLM's "
            "hybrid KV cache manager is off (--disable-hybrid-kv-cache-manager, or a KV connector "
            "that cannot do with it)."
        )
    if form.exact_pages is not None and drafts:
        said.append(
            f"{form.name} keeps exact pages, which are a cache group of their own, and vLLM wants "
            "the layers of a draft model (EAGLE, MTP) in one group; int8, fp8 and int6 serve them, "
            "and n-gram drafts go with every format."
        )
    if said:
        raise NoImplementation("QuantPage cannot serve this model in vLLM: " + " ".join(said))
