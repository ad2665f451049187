"""Choosing an implementation: once, when a backend is built, and never silently.

An ``Implementation`` says in sentences why it cannot serve a ``Call``. Automatic choice takes the
first candidate that has nothing to say; a named choice never falls back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import torch

from quantpage.cache.views import LayerFacts
from quantpage.errors import NoImplementation
from quantpage.formats import ExactPages, KVFormat
from quantpage.hardware import DeviceInfo, device_info

Phase = Literal["prefill", "decode"]
DECODE_TOKENS = 16
"""A step in which every request has at most this many new tokens is the decode phase."""


def phase_of(most: int) -> Phase:
    """The phase of a step; most: new tokens of the request that has most (``max_query_len``)."""
    return "decode" if most <= DECODE_TOKENS else "prefill"


@dataclass(frozen=True, slots=True)
class Call:
    """The facts of a call that do not change from step to step.

    Raises ValueError for counts below 1 and q_heads that are no multiple of kv_heads.
    """

    device: DeviceInfo
    format: KVFormat
    dtype: torch.dtype
    """Of the queries."""
    q_heads: int
    kv_heads: int
    head_dim: int
    """Of the layer's key pages; with ``latent`` of a latent row."""
    value_head_dim: int
    """Of its value pages; with ``latent`` the rotary channels of a key."""
    page_size: int
    phase: Phase = "prefill"
    mask: str = "causal"
    """'causal' (windows and sinks too), 'full', 'interval' or 'asked': ``Mask.kind``."""
    in_turn: bool = False
    """Of writing: keys have a map with feedback (formats/feedback)."""
    latent: bool = False
    """Keys and values are made of one latent row (``LayerKV.latent``)."""

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "head_dim", "value_head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads: expected a multiple of {self.kv_heads} kv_heads, got {self.q_heads}"
            )

    @property
    def out_dim(self) -> int:
        """Channels of an output."""
        return self.head_dim if self.latent else self.value_head_dim

    @property
    def group(self) -> int:
        """Query heads a kv_head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op."""

    name: str
    target: str
    """'package.module:function', imported when first asked for, so that importing quantpage
    imports no triton."""
    refusals: Callable[[Call], list[str]]
    """Sentences, each with the wanted and the got value; empty: can serve the call. See
    ops/refusals."""
    into: bool = False
    """Of attend: takes ``out``, and ``lse_wanted``, False to leave the log-sum-exp away."""
    joins: bool = False
    """Of attend: reads exact pages itself, in one call; else there are two and a merge."""
    turns: bool = False
    """Of attend, of one that joins: takes ``turned`` over exact pages, True to hand the output back
    in the model's basis; else the caller turns it."""
    whole: bool = False
    """Of attend: joins, and takes ``model_basis`` in fifth place, whatever the format."""
    reserve: str | None = None
    """Of attend: what holds the memory that launches keep (call, device, max_requests, max_tokens),
    named as ``target``; None: they keep none."""
    merge: str = "quantpage.ops.attend.merge:merge_partials"
    """Of attend, where it does not join: what merges the results of the two calls."""

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        return _load(self.target)

    def load_reserve(self) -> Callable[..., int] | None:
        """The function that ``reserve`` names."""
        return None if self.reserve is None else _load(self.reserve)

    def load_merge(self) -> Callable[..., Any]:
        """The function that ``merge`` names."""
        return _load(self.merge)


@lru_cache
def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


@lru_cache(maxsize=1024)
def call_of(
    facts: LayerFacts,
    q_heads: int,
    dtype: torch.dtype,
    phase: Phase,
    mask: str = "causal",
    in_turn: bool = False,
) -> Call:
    """The call that views themselves describe, in the words of dispatch."""
    exact = None if facts.exact_pages is None else ExactPages()
    near = None if facts.near is None else KVFormat(facts.near[0].code.name, *facts.near)
    return Call(
        device_info(facts.device),
        KVFormat("of these pages", facts.key, facts.value, exact, near=near),
        dtype,
        q_heads,
        facts.kv_heads,
        facts.head_dim,
        facts.value_head_dim,
        facts.page_size,
        phase,
        mask,
        in_turn,
        facts.latent,
    )


@lru_cache(maxsize=1024)
def _found(
    candidates: tuple[Implementation, ...], call: Call, wanted: str | None
) -> Implementation:
    return choose(candidates, call, wanted)


def find(
    candidates: Sequence[Implementation], call: Call, wanted: Implementation | str | None
) -> Implementation:
    """``wanted`` itself, or what ``choose`` says; looked up for calls that are alike."""
    if isinstance(wanted, Implementation):
        return wanted
    return _found(tuple(candidates), call, wanted)


def choose(
    candidates: Sequence[Implementation], call: Call, wanted: str | None = None
) -> Implementation:
    """The first candidate that can serve ``call``, or the one named ``wanted``.

    Raises NoImplementation with every refusal; ValueError for an unknown name.
    """
    if wanted is not None:
        named = [each for each in candidates if each.name == wanted]
        if not named:
            names = ", ".join(each.name for each in candidates)
            raise ValueError(f"implementation: expected one of {names}; got {wanted!r}")
        candidates = named
    said = []
    for each in candidates:
        reasons = each.refusals(call)
        if not reasons:
            return each
        said.append(f"{each.name}: {' '.join(reasons)}")
    raise NoImplementation(
        f"nothing can serve format {call.format.name} on {call.device.name}:\n  "
        + "\n  ".join(said)
    )
