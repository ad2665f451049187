"""What is drawn of a case before it runs: everything that does not depend on how it goes."""

from dataclasses import dataclass, fields, replace

import numpy as np

from .numbers import FORMS, MIXES, form_of
from .shown import INTERVAL_KINDS

KINDS = ("torch", "cpu", "triton", "cuda")
"""Who computes: plain torch, the compiled core, Triton's interpreter, a GPU."""


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes, formats and masks; ``str`` is its line."""

    seed: int
    number: int
    kind: str
    formats: tuple[str, ...]
    """Of each layer."""
    page_size: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    dtype: str
    mask: str
    """'causal', 'full', or a kind of intervals with a prefix 'interval '."""
    window: int | None
    sink_tokens: int
    described: int
    """Tokens that interval masks describe, about."""
    each_its_own: bool
    """A mask a request."""
    softcap: float | None
    sinks: bool
    key_map: str
    """'', 'scale', 'mean' (both)."""
    write: tuple[str, ...]
    """Of 'bias', 'norm', 'rope', 'norm after'."""
    operations: int
    longest: int
    """Tokens that a request may reach."""
    latent: bool = False
    """Layers of latent rows: head_dim is a row's, value_dim that of the rotary channels."""
    in_turn: bool = False
    """Keys are rounded in turn: their map has feedback."""
    reference: bool = False
    """Who computes is compared with the oracle, and the reference as well."""

    @property
    def query_dim(self) -> int:
        """Channels of a query."""
        return self.head_dim + self.value_dim if self.latent else self.head_dim

    @property
    def out_dim(self) -> int:
        """Channels of an output."""
        return self.head_dim if self.latent else self.value_dim

    def __str__(self) -> str:
        told = " ".join(
            f"{each.name}={_word(getattr(self, each.name))}"
            for each in fields(self)
            if each.name not in ("seed", "number")
        )
        return f"--seed {self.seed} --case {self.number}  {told}"


def _word(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def draw_case(seed: int, number: int, kinds: tuple[str, ...]) -> Case:
    """Case ``number`` of a seed; kinds: the ones to draw from."""
    rng = np.random.default_rng([seed, number])
    # One number whatever there is to choose from, so that --only KIND draws the same case again.
    kind = kinds[int(rng.random() * len(kinds))]
    slow = kind == "triton"
    formats = tuple(_one(rng, list(FORMS)) for _ in range(1 if slow or rng.random() < 0.7 else 2))
    page_size = _one(rng, [16, 32] if slow else [16, 16, 32, 64, 128, 256])
    head_dim = _one(rng, [64, 80, 96, 128] if slow else [64, 64, 80, 96, 128, 256])
    value_dim = head_dim if rng.random() < 0.85 else _one(rng, [64, 128])
    softcap = float(_one(rng, [5.0, 30.0])) if rng.random() < 0.2 else None
    mask, window, sink_tokens = _mask(rng, page_size)
    maps = ["", "", "", "scale"] if softcap else ["", "", "scale", "mean"]
    write = _write(rng)
    case = Case(
        seed,
        number,
        kind,
        formats,
        page_size,
        kv_heads=_one(rng, [1, 2] if slow else [1, 2, 4]),
        group=_one(rng, [1, 2, 4] if slow else [1, 2, 3, 4, 8]),
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=_dtype(rng, kind),
        mask=mask,
        window=window,
        sink_tokens=sink_tokens,
        described=int(rng.integers(1, 5 * page_size)),
        each_its_own=bool(rng.random() < 0.5),
        softcap=softcap,
        sinks=bool(rng.random() < 0.25),
        key_map=_one(rng, maps),
        write=write,
        operations=int(rng.integers(2, 4)) if slow else int(rng.integers(4, 14)),
        longest=int(min(400 if not slow else 100, page_size * 6 + 7)),
    )
    # Drawn apart, so that what is drawn of other cases stays as it was.
    rng = np.random.default_rng([seed, number, 2])
    # Triton's kernels refuse most mixes.
    if rng.random() < (0.04 if slow else 0.15):
        case = replace(case, formats=tuple(_one(rng, list(MIXES)) for _ in formats))
    if rng.random() < 0.15:
        case = _of_latent_rows(case, rng)
    whole = all(form_of(name)[0].code not in ("none", "fp8") for name in case.formats)
    in_turn = np.random.default_rng([seed, number, 3]).random() < 0.5
    if case.key_map and whole and in_turn:
        case = replace(case, in_turn=True)
    return replace(case, reference=kind == "torch" and rng.random() < 0.4)


def _of_latent_rows(case: Case, rng: np.random.Generator) -> Case:
    """One row for all heads, which come normed and turned; no key map."""
    # Triton's kernels refuse the others.
    formats = ["none", "int8", "fp8", "k=int8,v=fp8", "k=int8,v=none"]
    if case.kind == "triton":
        case = replace(case, formats=tuple(_one(rng, formats) for _ in case.formats))
    return replace(
        case,
        latent=True,
        kv_heads=1,
        group=_one(rng, [1, 2, 3, 6, 16]),
        head_dim=_one(rng, [64, 80, 96, 128, 512]),
        value_dim=_one(rng, [16, 32, 48, 64]),
        key_map="",
        write=(),
    )


def _one(rng: np.random.Generator, choices: list):
    return choices[int(rng.integers(len(choices)))]


def _dtype(rng, kind: str) -> str:
    if kind == "triton":
        # Its interpreter has no bfloat16.
        return _one(rng, ["float16", "float16", "float32"])
    if kind == "cuda":
        return _one(rng, ["float16", "bfloat16", "bfloat16", "float32"])
    if kind == "cpu":
        return _one(rng, ["float32", "float32", "bfloat16", "float16"])
    return _one(rng, ["float32", "float32", "float64", "bfloat16", "float16"])


def _mask(rng, page_size: int) -> tuple[str, int | None, int]:
    drawn = rng.random()
    if drawn < 0.3:
        return "causal", None, 0
    if drawn < 0.55:
        # About borders of pages, where windows go wrong.
        window = page_size * int(rng.integers(0, 4)) + int(rng.integers(-1, 3))
        sink_tokens = int(rng.integers(1, 2 * page_size)) if rng.random() < 0.4 else 0
        return "causal", max(window, 1), sink_tokens
    if drawn < 0.62:
        return "full", None, 0
    return f"interval {_one(rng, list(INTERVAL_KINDS))}", None, 0


def _write(rng) -> tuple[str, ...]:
    steps = ["bias"] if rng.random() < 0.2 else []
    if rng.random() < 0.3:
        steps.append("rope")
    if rng.random() < 0.2:
        steps.append("norm after" if rng.random() < 0.3 else "norm")
    return tuple(steps)
