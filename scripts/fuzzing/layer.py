"""One layer of a case: what belongs to it, and one step of it checked."""

from dataclasses import dataclass

import numpy as np
import torch

from quantpage import (
    AttendParams,
    CacheLayout,
    WriteParams,
    build_attention,
    find_backend,
    find_format,
)
from quantpage import rope_table as make_rope
from quantpage.attention import LayerAttention
from quantpage.batch import BatchPlan
from quantpage.cache import LayerKV
from quantpage.formats import KeyMap
from quantpage.formats.feedback import with_feedback
from quantpage.hardware import DeviceInfo, device_info
from quantpage.masks import Mask
from quantpage.ops.attend.reference import attend as reference
from quantpage.ops.dispatch import DECODE_TOKENS, Call
from quantpage.ops.rope_write import QKNorm

from .attention import Rule, Seen, check
from .case import Case
from .keys import (
    Rope,
    Rows,
    Turn,
    beside,
    in_basis,
    mapped_keys,
    mapped_queries,
    normed,
    turned,
    with_bias,
)
from .numbers import check_close, form_of, rotate
from .pages import EPS, TINY, Half

AMPERE = DeviceInfo("cuda", "Triton's interpreter", (8, 0), 108)
NAMES = {"torch": "torch", "cpu": "cpu", "triton": "triton", "cuda": None}
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Given:
    """Numbers that belong to a layer."""

    bias: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    norm: tuple[np.ndarray, np.ndarray] | None
    rope: Rope | None
    map_scale: np.ndarray | None
    map_mean: np.ndarray | None
    sinks: np.ndarray | None
    static: tuple | None
    metric: np.ndarray | None
    """Of queries, by which keys are rounded in turn."""
    turn: Turn | None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's format, numbers and implementations."""

    case: Case
    format: str
    given: Given
    run: LayerAttention

    @classmethod
    def draw(cls, case: Case, name: str, rng: np.random.Generator, backend: str, mask: Mask):
        """Raises NoImplementation where nobody serves it."""
        device = AMPERE if case.kind == "triton" else device_info(device_of(case))
        call = Call(
            device, find_format(name), getattr(torch, case.dtype), case.kv_heads * case.group,
            case.kv_heads, case.head_dim, case.value_dim, case.page_size, latent=case.latent,
            in_turn=case.in_turn,
        )  # fmt: skip
        run = build_attention(find_backend(backend), mask, call, NAMES[case.kind])
        return cls(case, name, _given(case, name, rng), run)

    @property
    def specs(self):
        """Keys' and values'."""
        return form_of(self.format)[:2]

    @property
    def layout(self) -> CacheLayout:
        """As the cache is asked for it."""
        case = self.case
        return CacheLayout(
            case.kv_heads, case.head_dim, find_format(self.format), case.page_size,
            getattr(torch, case.dtype), case.value_dim, case.latent,
        )  # fmt: skip

    def key_map(self) -> KeyMap | None:
        """For ``add_layer``."""
        given = self.given
        if given.map_scale is None:
            return None
        mean = None if given.map_mean is None else tensor(given.map_mean)
        made = KeyMap(tensor(given.map_scale), mean)
        if given.metric is not None:
            made = with_feedback(made, tensor(given.metric), self.specs[0].rotated)
        return made.to(device_of(self.case))

    def static(self):
        """For ``add_layer``."""
        if self.given.static is None:
            return None
        return tuple(
            tuple(None if x is None else tensor(x).to(device_of(self.case)) for x in pair)
            for pair in self.given.static
        )

    def write_params(self) -> WriteParams:
        """As the op takes them."""
        case, given, device = self.case, self.given, device_of(self.case)
        dtype = getattr(torch, case.dtype)
        rope = given.rope and make_rope(
            case.longest + 1,
            given.rope.rotary_dim,
            given.rope.theta,
            given.rope.interleaved,
            device,
        )
        norm = given.norm and QKNorm(
            *(tensor(each).to(device, dtype) for each in given.norm),
            eps=NORM_EPS,
            after_rope="norm after" in case.write,
        )
        bias = given.bias and tuple(tensor(each).to(device, dtype) for each in given.bias)
        return WriteParams(rope, norm, bias)

    def expected(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray):
        """Rows in the basis of the cache."""
        case, given = self.case, self.given
        rows = [Rows.exact(each) for each in (q, k, v)]
        if given.bias is not None:
            rows = [with_bias(each, b) for each, b in zip(rows, given.bias, strict=True)]
        made = []
        for at, each in enumerate(rows[:2]):
            if given.norm is not None and "norm" in case.write:
                each = normed(each, given.norm[at], NORM_EPS)
            if given.rope is not None:
                each = turned(each, positions, given.rope)
            if given.norm is not None and "norm after" in case.write:
                each = normed(each, given.norm[at], NORM_EPS)
            made.append(each)
        if given.map_scale is not None:
            made[0] = mapped_queries(made[0], given.map_scale)
            made[1] = mapped_keys(made[1], given.map_scale, given.map_mean)
        key, value = self.specs
        if case.latent:
            # A query meets both halves of a key.
            parts = (
                in_basis(made[0].channels(slice(None, case.head_dim)), key.rotated),
                in_basis(made[0].channels(slice(case.head_dim, None)), value.rotated),
            )
            turned_q = beside(*parts)
        else:
            turned_q = in_basis(made[0], key.rotated)
        return (
            turned_q,
            in_basis(made[1], key.rotated),
            in_basis(rows[2], value.rotated),
        )

    def step(self, rows, view: LayerKV, batch: BatchPlan, mask: Mask, sees) -> None:
        """Write and attend; sees(halves, request) -> Seen. rows: (tensors, expected)."""
        (q, k, v), (q_rows, _, _) = rows
        case, given = self.case, self.given
        written = self.run.write_step(q, k, v, view, batch, self.write_params())
        got_q = written.q.cpu().double().numpy()
        loose = EPS[case.dtype] * np.abs(q_rows.x) + TINY[case.dtype] + q_rows.slack
        where = f"layer of {self.format}"
        check_close(np.abs(got_q - q_rows.x) - loose, got_q, q_rows.x, f"{where}: query")
        sinks = None if given.sinks is None else tensor(given.sinks).to(q.device)
        params = AttendParams(case.query_dim**-0.5, mask, case.softcap, sinks)
        found = self.run.attend_step(written.q, view, batch, params)
        out, lse = (each.cpu().double().numpy() for each in found)
        stated = None
        if case.reference:
            stated = [each.numpy() for each in reference(written.q, view, batch, params)]
        key, value = self.specs
        halves = (
            Half.of(key, view.key, view.exact_key),
            Half.of(value, view.value, view.exact_value),
        )
        rule = Rule(params.softmax_scale, case.softcap, given.sinks)
        summed = key if case.latent else value
        kinds = (self._low(batch), case.dtype, summed.rotated)
        first = 0
        for request, new in enumerate(batch.query_lens):
            own = slice(first, first + new)
            first += new
            if new:
                missing = self._missing(got_q[own], params.softmax_scale)
                seen: Seen = sees(halves, request, bool(form_of(self.format)[2]))
                got = out[own], lse[own]
                check(got, got_q[own], seen, rule, kinds, missing, f"{where}, row {request}")
                if stated is not None:
                    # It knows nothing of models: its basis and its scores are the cache's.
                    got = stated[0][own], stated[1][own]
                    told = f"{where}, row {request}, reference"
                    check(got, got_q[own], seen, rule, ("float32", "float64", False), None, told)

    def _low(self, batch: BatchPlan) -> str:
        """To what the implementation of this step may round what it multiplies."""
        few = batch.max_query_len <= DECODE_TOKENS
        if (self.run.decode if few else self.run.prefill).name == "torch":
            return "float32"
        return "bfloat16" if self.case.dtype == "bfloat16" else "float16"

    def _missing(self, q: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray] | None:
        """What the mean of a key map took out of the scores of each row, and its terms' sizes."""
        given = self.given
        if given.map_mean is None or given.map_scale is None:
            return None
        mean = given.map_scale * given.map_mean
        mean = rotate(mean) if self.specs[0].rotated else mean
        terms = q * np.repeat(mean, self.case.group, 0) * scale
        return terms.sum(-1), np.abs(terms).sum(-1)


def device_of(case: Case) -> str:
    """Where its tensors are."""
    return "cuda" if case.kind == "cuda" else "cpu"


def tensor(x: np.ndarray) -> torch.Tensor:
    """float32."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _given(case: Case, name: str, rng: np.random.Generator) -> Given:
    heads, q_heads, width = case.kv_heads, case.kv_heads * case.group, case.head_dim

    def model(x):
        return tensor(x).to(getattr(torch, case.dtype)).double().numpy()

    bias = norm = rope = scale = mean = None
    if "bias" in case.write:
        bias = tuple(
            model(rng.normal(0, 1, (n, w)))
            for n, w in ((q_heads, width), (heads, width), (heads, case.value_dim))
        )
    if "norm" in case.write or "norm after" in case.write:
        norm = tuple(model(rng.uniform(0.5, 1.5, width)) for _ in range(2))
    if "rope" in case.write:
        part = width if rng.random() < 0.7 else 2 * int(rng.integers(1, width // 4)) * 2
        rope = Rope(10000.0, part, bool(rng.random() < 0.4))
    if case.key_map:
        scale = rng.uniform(0.25, 4.0, (heads, width)).astype(np.float32).astype(np.float64)
    if case.key_map == "mean":
        mean = rng.normal(0, 4, (heads, width)).astype(np.float32).astype(np.float64)
    sinks = rng.normal(0, 3, q_heads).astype(np.float32).astype(np.float64) if case.sinks else None
    key, value, _ = form_of(name)
    static = None
    if key.given or value.given:
        static = tuple(
            _static(spec, (heads, w), rng) if spec.given else (None, None)
            for spec, w in ((key, width), (value, case.value_dim))
        )
    metric = turn = None
    if case.in_turn:
        # Queries of a few directions, and of some others.
        few = rng.normal(0, 1, (heads, width, int(rng.integers(4, width // 2))))
        metric = few @ np.swapaxes(few, 1, 2) + rng.uniform(0.0, 1.0) * np.eye(width)
        metric = metric.astype(np.float32).astype(np.float64)
        turn = Turn.of(metric, scale, key.rotated)
    return Given(bias, norm, rope, scale, mean, sinks, static, metric, turn)


def _static(spec, shape, rng):
    """Scales that clip now and then; powers of two where quotients are to be exact."""
    shape = shape if spec.given == "channel" else (shape[0], 1)
    scale = rng.uniform(1.0, 6.0, shape) / spec.high
    if rng.random() < 0.5:
        scale = 2.0 ** np.round(np.log2(scale))
    zero = rng.normal(0, 0.5, shape) if spec.zero else None
    return tuple(
        None if x is None else x.astype(np.float32).astype(np.float64) for x in (scale, zero)
    )
