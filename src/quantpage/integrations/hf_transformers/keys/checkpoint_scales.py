"""Static scales of keys and values that a checkpoint's own files hold.

    compressed-tensors, vLLM  <layer>.self_attn.k_scale, .v_scale            number = scale code
    ModelOpt                  <layer>.self_attn.k_proj.k_scale, v_proj.v_scale           the same
    FastDeploy                <layer>.self_attn.cachek_matmul.activation_scale, cachev_matmul

FastDeploy's is the largest number where codes have 8 bits, so that scale = it / 127 or / 448; with
4 bits it is the scale itself, beside .activation_zero_point in codes.

One number serves a tensor, one a kv_head its channels, one a channel is taken as it is. Whatever is
missing, too much, not finite or of another shape is a FormatError that names layer and tensor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from quantpage.errors import FormatError
from quantpage.formats import KVFormat, LayerScales, QuantSpec, StaticScales
from quantpage.formats.scales import ScalePair
from quantpage.integrations.hf_transformers.loading.checkpoint import check_weights

_SCALE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:[\w.]*\.)?([kv])_scale$")
_FASTDEPLOY = re.compile(
    r"(?:^|\.)layers\.(\d+)\.[\w.]*cache([kv])_matmul\.activation_(scale|zero_point)$"
)
_HALVES = {"k": "key", "v": "value"}


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    tensor: Tensor
    largest: bool
    """True for FastDeploy's: in 8 bits the largest number, not a scale."""


def read_checkpoint_scales(
    folder: Path, formats: Sequence[KVFormat], kv_heads: int, head_dim: int
) -> StaticScales | None:
    """The scales of the layers whose format is static; None where the folder holds none at all.

    formats: of the layers, at least one of them static.
    """
    wanted = {index: each for index, each in enumerate(formats) if not each.dynamic}
    scales, zeros = _read(folder)
    if not scales:
        return None
    for index, half in scales | zeros:
        if index >= len(formats):
            name = (scales | zeros)[index, half].name
            raise FormatError(
                f"layer {index}, {half} scale: expected layers 0 to {len(formats) - 1}, got {name}"
            )
    layers = {}
    for index, form in wanted.items():
        pairs = []
        for half, spec in (("key", form.key), ("value", form.value)):
            found, zero = scales.get((index, half)), zeros.get((index, half))
            pairs.append(_pair(f"layer {index}, {half}", found, zero, spec, kv_heads, head_dim))
        (key, key_zero), (value, value_zero) = pairs
        layers[index] = LayerScales(key, value, key_zero, value_zero)
    return StaticScales(next(iter(wanted.values())), kv_heads, head_dim, layers)


def _read(
    folder: Path,
) -> tuple[dict[tuple[int, str], _Found], dict[tuple[int, str], _Found]]:
    """Scales and zeros by layer and half."""
    check_weights(folder)
    scales: dict[tuple[int, str], _Found] = {}
    zeros: dict[tuple[int, str], _Found] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                plain, other = _SCALE.search(name), _FASTDEPLOY.search(name)
                match = plain or other
                if match is None:
                    continue
                at = int(match[1]), _HALVES[match[2]]
                into = zeros if other is not None and other[3] == "zero_point" else scales
                if at in into:
                    raise FormatError(
                        f"layer {at[0]}, {at[1]} scale: expected one tensor, got {into[at].name} "
                        f"and {name}"
                    )
                into[at] = _Found(name, opened.get_tensor(name).float(), other is not None)
    return scales, zeros


def _pair(
    where: str,
    found: _Found | None,
    zero: _Found | None,
    spec: QuantSpec,
    kv_heads: int,
    head_dim: int,
) -> ScalePair:
    if not spec.quantized or spec.dynamic:
        return None, None
    if found is None:
        raise FormatError(f"{where} scale: expected one in the checkpoint, found none")
    if spec.zero_point != (zero is not None):
        wanted, got = ("a zero point", "none") if zero is None else ("no zero point", zero.name)
        raise FormatError(f"{where} zero: expected {wanted} in the checkpoint, found {got}")
    scale = _shaped(f"{where} scale, {found.name}", found.tensor, spec, kv_heads, head_dim)
    if found.largest and spec.code.bits == 8:
        scale = scale / spec.code.qmax
    if zero is None:
        return scale, None
    codes = _shaped(f"{where} zero, {zero.name}", zero.tensor, spec, kv_heads, head_dim)
    # Theirs is the code that 0 stands at, ours the number that code 0 stands for.
    return scale, -codes * scale


def _shaped(where: str, plane: Tensor, spec: QuantSpec, kv_heads: int, head_dim: int) -> Tensor:
    """As the spec's scales are, whoever owned them in the file."""
    wanted = spec.granularity.scale_shape(kv_heads, head_dim)
    flat = plane.flatten()
    if flat.numel() == 1:
        return flat.expand(wanted).clone()
    if flat.numel() == kv_heads and wanted[0] == kv_heads:
        return flat[:, None].expand(wanted).clone()
    if flat.numel() == wanted[0] * wanted[1]:
        return flat.view(wanted)
    raise FormatError(
        f"{where}: expected 1, {kv_heads} or {wanted[0] * wanted[1]} numbers, got "
        f"{tuple(plane.shape)}"
    )
