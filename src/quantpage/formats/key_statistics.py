"""What keys and queries of a model look like, and the key map that follows from it.

The score of a key is off by ``q . e``, e the error of its rounding: squared, over a model's
queries, ``e' W e`` with W the mean of q q'. That, and not the size of e, is what rounding has to
keep small (HeadQ, arXiv 2605.03562, says the same of attention's KL). For a map of one scale a
channel, whose rounding errors are all of about the same size after the rotation, the loss is the
product of tr(W / s^2) and tr(C s^2), C the keys' covariance: least for s^4 = W_cc / C_cc.

Of pages that are kept exact nothing is off. Where a format keeps the near ones, W is the mean of
queries with the share of their attention that goes beyond those (``far``): what a query that looks
at its neighbours alone asks for costs nothing.

Where keys are rounded in turn, errors take W's shape by themselves. The loss is then the product of
det(W / s^2)^(1/D) and tr(C s^2): least for s^2 = 1 / C_cc, whatever W. Neither law is exact, so
``choose_map`` tries both, in part and whole.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.feedback import quantize_with_feedback, with_feedback
from quantpage.formats.key_map import KeyMap
from quantpage.formats.key_scales import WIDEST, search_scales
from quantpage.formats.key_turns import search_turn
from quantpage.formats.quantize import dequantize, quantize
from quantpage.formats.rotate import rotate
from quantpage.formats.spec import QuantSpec

_FLOOR = 1e-4
"""Of a channel's variance, relative to the mean of its head: no channel is scaled without end."""
_KEPT, _MOST = 1024, 4096
"""Keys that are kept of one text, and of all: beyond that every second one."""
_FEW, _SEARCHED = 256, 512
"""Of them those that laws are tried on, and that scales are looked for on. A matrix, which has so
many more numbers, is looked for on all."""
_FIRST = 64
"""First keys that are kept."""
EXPONENTS = (
    (0.0, 0.0), (1 / 8, 1 / 8), (1 / 4, 1 / 4),
    (0.0, 1 / 8), (0.0, 1 / 4), (0.0, 3 / 8), (0.0, 1 / 2),
)  # fmt: skip
"""(a, b) of scales W_cc^a / C_cc^b, tried by ``choose_map``; of equal losses the first wins."""


@dataclass(slots=True)
class KeyStatistics:
    """Moments of one layer's keys and queries, after RoPE; sums in float64."""

    tokens: int
    query_products: Float[Tensor, "kv_heads head_dim head_dim"]
    """Sum of q q' over tokens, mean over the query heads of a kv_head."""
    far_products: Float[Tensor, "kv_heads head_dim head_dim"]
    """The same, every query times the share of its attention that goes beyond exact pages."""
    key_products: Float[Tensor, "kv_heads head_dim head_dim"]
    key_sums: Float[Tensor, "kv_heads head_dim"]
    keys: Float[Tensor, "rows kv_heads head_dim"]
    """Some of them, what roundings are tried on; in the dtype that they came in, or float32."""
    first_keys: Float[Tensor, "texts kv_heads head_dim"]
    """Of texts' first tokens, in none of the above, float32; none where they are kept exact."""

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "tokens q_heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        far: Float[Tensor, "tokens q_heads"] | None = None,
        first: Float[Tensor, "texts kv_heads head_dim"] | None = None,
    ) -> "KeyStatistics":
        """Of some tokens. far: shares of their attention, 0 to 1; None: all of it. first: keys of
        their texts' first tokens.
        """
        kept = k[:: max(1, -(-len(k) // _KEPT))]
        q, k = q.double(), k.double()
        tokens, kv_heads, _ = k.shape
        grouped = q.unflatten(1, (kv_heads, -1))
        group = grouped.shape[2]
        products = torch.einsum("thgi,thgj->hij", grouped, grouped) / group
        beyond = products
        if far is not None:
            shares = far.double().unflatten(1, (kv_heads, -1))
            beyond = torch.einsum("thg,thgi,thgj->hij", shares, grouped, grouped) / group
        return cls(
            tokens,
            products,
            beyond,
            torch.einsum("thi,thj->hij", k, k),
            k.sum(0),
            kept.float() if kept.dtype == torch.float64 else kept.clone(),
            k[:0].float() if first is None else first.float(),
        )

    def __add__(self, other: "KeyStatistics") -> "KeyStatistics":
        """Of both's tokens."""
        keys = torch.cat([self.keys, other.keys])
        return KeyStatistics(
            self.tokens + other.tokens,
            self.query_products + other.query_products,
            self.far_products + other.far_products,
            self.key_products + other.key_products,
            self.key_sums + other.key_sums,
            keys[::2].contiguous() if len(keys) > _MOST else keys,
            torch.cat([self.first_keys, other.first_keys])[:_FIRST],
        )

    def far(self) -> "KeyStatistics":
        """The same with queries by what of their attention goes beyond exact pages, where first
        tokens are not.

        kv_heads whose queries never look there, as of a window of few tokens, stay as they are.
        """
        looks = self.far_products.diagonal(dim1=1, dim2=2).sum(1) > 0
        products = torch.where(looks[:, None, None], self.far_products, self.query_products)
        return replace(self, query_products=products, first_keys=self.first_keys[:0])

    @property
    def metric(self) -> Float[Tensor, "kv_heads head_dim head_dim"]:
        """W: mean of q q'."""
        return self.query_products / self.tokens

    @property
    def mean(self) -> Float[Tensor, "kv_heads head_dim"]:
        """Of the keys."""
        return self.key_sums / self.tokens

    def key_map(self, mean: bool = True, a: float = 0.25, b: float = 0.25) -> KeyMap:
        """The map that these tokens ask for.

        mean: take it out. a, b: scales are W_cc^a / C_cc^b; as they stand the best for channels
        that are rounded by themselves.
        """
        taken = self.mean if mean else torch.zeros_like(self.mean)
        second = self.key_products.diagonal(dim1=1, dim2=2) / self.tokens
        variance = _floored(second - 2 * self.mean * taken + taken.square())
        weight = _floored(self.metric.diagonal(dim1=1, dim2=2))
        logs = weight.log() * a - variance.log() * b
        # Of a head's scales only their ratios matter.
        scale = (logs - logs.mean(1, keepdim=True)).exp()
        return KeyMap(scale.float().contiguous(), taken.float().contiguous() if mean else None)


@dataclass(frozen=True, slots=True)
class ChosenMap:
    """A layer's map, and what the keys that were kept lose by it."""

    key_map: KeyMap
    """Without feedback: that depends on the codes, and the metric says it."""
    exponents: tuple[tuple[float, float], ...]
    """Of each kv_head, one of EXPONENTS."""
    loss: float
    """Mean of ``e' W e`` relative to that of ``k' W k``, keys about their mean."""
    plain_loss: float
    """Without a map, channels rounded by themselves."""


def choose_map(
    statistics: KeyStatistics,
    spec: QuantSpec,
    mean: bool = True,
    feedback: bool = True,
    search: bool = False,
) -> ChosenMap:
    """The scales of each kv_head with the least loss, rounded as ``spec`` does.

    spec: dynamic. mean: take it out. feedback: round in turn where codes are whole numbers. search:
    there, go on from the best of EXPONENTS to scales that no law says (key_scales), in heads of up
    to WIDEST channels, heed first keys, and look for a turn (key_turns).
    """
    whole = statistics
    statistics = replace(whole, keys=_thinned(whole.keys, _SEARCHED if search else _FEW))
    maps = [statistics.key_map(mean, a, b) for a, b in EXPONENTS]
    losses = torch.stack([_loss(statistics, spec, each, feedback) for each in maps])
    best = losses.argmin(0)
    heads = torch.arange(len(best), device="cpu")
    found = KeyMap(torch.stack([each.scale for each in maps])[best, heads], maps[0].mean)
    if search and feedback and spec.code.integer:
        found = _turned(whole, spec, _searched(statistics, spec, found))
    apart = statistics.keys.double() - statistics.mean
    size = _weighed(apart, statistics.metric).sum()
    return ChosenMap(
        found,
        tuple(EXPONENTS[each] for each in best.tolist()),
        float(_loss(statistics, spec, found, feedback).sum() / size),
        float(_loss(statistics, spec, None, feedback).sum() / size),
    )


def _searched(statistics: KeyStatistics, spec: QuantSpec, law: KeyMap) -> KeyMap:
    """A map that loses no more than ``law``, first keys as dear as all others together.

    Models park much of their attention on a first token, whose key is like no other and the same
    in all texts. What is taken out may be half of the way from it to the mean of the others.
    """
    first = statistics.first_keys
    rows = _with_first(statistics)
    means = [law.mean]
    if law.mean is not None and len(first):
        means.append((law.mean + first.mean(0)) / 2)
    best, least = law, _lost(statistics, spec, law)
    for mean in means:
        scale = law.scale
        if scale.shape[1] <= WIDEST:
            apart = rows if mean is None else rows - mean
            scale = search_scales(statistics.metric, apart, scale, spec)
        loss = _lost(statistics, spec, KeyMap(scale, mean))
        less = (loss < least)[:, None]
        least = torch.where(less[:, 0], loss, least)
        if mean is not None and best.mean is not None:
            mean = torch.where(less, mean, best.mean).contiguous()
        best = KeyMap(torch.where(less, scale, best.scale).contiguous(), mean)
    return best


def _turned(statistics: KeyStatistics, spec: QuantSpec, found: KeyMap) -> KeyMap:
    """The map with a turn in heads that lose less by it, on keys that it was not looked for on."""
    keys = statistics.keys.float()
    seen = torch.arange(len(keys), device="cpu") % 4 != 3
    rest = replace(statistics, keys=keys[~seen])
    if not len(rest.keys):
        return found
    rows = _with_first(replace(statistics, keys=keys[seen]))
    turn = search_turn(statistics.metric, rows, found, spec)
    turned = KeyMap(found.scale, found.mean, turn=turn)
    less = _lost(rest, spec, turned) < _lost(rest, spec, found)
    if not bool(less.any()):
        return found
    turn = torch.where(
        less[:, None, None], turn, torch.eye(turn.shape[1], device="cpu")
    ).contiguous()
    return KeyMap(found.scale, found.mean, turn=turn)


def _lost(statistics: KeyStatistics, spec: QuantSpec, key_map: KeyMap) -> Tensor:
    """[kv_heads], first keys as dear as all others together."""
    first = statistics.first_keys
    texts = [statistics] + ([replace(statistics, keys=first)] if len(first) else [])
    return torch.stack([_loss(each, spec, key_map, True) for each in texts]).sum(0)


def _with_first(statistics: KeyStatistics) -> Tensor:
    """Its keys, and its first keys so often that there are as many of them."""
    keys, first = statistics.keys, statistics.first_keys
    often = -(-len(keys) // max(1, len(first)))
    return torch.cat([keys, first.repeat(often, 1, 1)])


def _thinned(keys: Tensor, most: int) -> Tensor:
    return keys[:: max(1, -(-len(keys) // most))].float()


def _loss(
    statistics: KeyStatistics, spec: QuantSpec, key_map: KeyMap | None, feedback: bool
) -> Tensor:
    """[kv_heads]."""
    turned = spec.rotation == "hadamard"
    keys = statistics.keys
    x = keys if key_map is None else key_map.keys(keys)
    x = rotate(x) if turned else x
    if key_map is None or not (feedback and spec.code.integer):
        codes = quantize(x, spec)
    else:
        factor = with_feedback(key_map, statistics.metric, turned).feedback
        assert factor is not None
        codes = quantize_with_feedback(x, spec, factor)
    seen = dequantize(*codes, spec)
    seen = rotate(seen) if turned else seen
    seen = seen if key_map is None else key_map.restored(seen)
    return _weighed((seen - keys).double(), statistics.metric)


def _weighed(x: Float[Tensor, "rows kv_heads head_dim"], metric: Tensor) -> Tensor:
    return torch.einsum("thi,hij,thj->h", x, metric, x) / len(x)


def _floored(x: Float[Tensor, "kv_heads head_dim"]) -> Tensor:
    return x.clamp_min(1e-30).maximum(_FLOOR * x.mean(1, keepdim=True))
