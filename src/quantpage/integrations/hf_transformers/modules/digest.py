"""What keys and values of a model depend on, in a few bytes: weights, code, numbers, configuration.

Every byte of every weight counts. They are summed in 64-bit words, each times its own odd number,
modulo 2 ** 64: one changed word always changes a sum, and two that make up for each other are as
rare as 1 in 2 ** 64. Such sums are the same on every device, cost about what reading the weights
costs, and need no copy to the host; a cryptographic hash of the sums then joins them. Sums are made
anew each time: a version counter misses what is written through ``.data``, as adapters are merged.
"""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from hashlib import blake2b, shake_128
from typing import Any

import torch
from torch import Tensor, nn

from quantpage.errors import UnsupportedModel

_CHUNK = 1 << 14
"""Words a sum is taken of."""
_AT_ONCE = 1 << 8
"""Chunks that are multiplied at once: 32 MiB of products."""

_HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Entries of a configuration that change no key, value or attention (dtypes are the weights')."""

_UNSTEADY = ("inv_freq", "original_inv_freq", "max_seq_len_cached")
"""What rotary embeddings that depend on the length change as they go; the configuration says all
that they depend on."""


def model_digest(model: nn.Module, mask: Any = None) -> str:
    """Of a model, and of the mask that attention follows in place of its own rule.

    Raises UnsupportedModel for weights whose bytes are not at hand.
    """
    made = blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None:
        made.update(json.dumps(_plain(config.to_dict()), sort_keys=True, default=str).encode())
    for part in _parts(mask):
        made.update(part)
    for name, module in model.named_modules():
        unsteady = getattr(module, "rope_type", "default") not in (
            "default",
            "linear",
            "yarn",
            "llama3",
        )
        made.update(f"{name} {type(module).__qualname__} {_numbers(module)}\n".encode())
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in sorted(tensors.items()):
            if tensor is not None and not (unsteady and key in _UNSTEADY):
                made.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                made.update(_checksum(f"{name}.{key}", tensor))
    return made.hexdigest()


def _plain(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(k): _plain(v) for k, v in config.items() if k not in _HARMLESS}
    return config


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain numbers that hang in a module: scaling, windows, epsilons."""
    return sorted(
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float))
        and not key.startswith("_")
        and key not in ("training", "gradient_checkpointing", *_UNSTEADY)
    )


def _parts(value: Any) -> Iterator[bytes]:
    """A mask's class, numbers and tensors."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield _checksum("mask", value)
    elif is_dataclass(value):
        yield f"{type(value).__qualname__}(".encode()
        for each in fields(value):
            yield f"{each.name}=".encode()
            yield from _parts(getattr(value, each.name))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)
    else:
        yield repr(value).encode()


@lru_cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers, the same everywhere."""
    drawn = torch.frombuffer(
        bytearray(shake_128(b"quantpage").digest(8 * _CHUNK)), dtype=torch.int64
    )
    return (drawn | 1).to(device)


@torch.no_grad()
def _checksum(name: str, tensor: Tensor) -> bytes:
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise UnsupportedModel(
            f"{name}: expected a weight whose bytes can be read, got {type(tensor).__name__} on "
            f"{tensor.device}"
        )
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words, made = flat[:whole].view(torch.int64), blake2b(digest_size=16)
    factors = _factors(flat.device)
    for part in words.split(_CHUNK * _AT_ONCE):
        full = part.numel() // _CHUNK * _CHUNK
        sums = [(part[:full].view(-1, _CHUNK) * factors).sum(1)]
        if full < part.numel():
            sums.append((part[full:] * factors[: part.numel() - full]).sum()[None])
        made.update(torch.cat(sums).cpu().numpy().tobytes())
    made.update(flat[whole:].cpu().numpy().tobytes())
    return made.digest()
