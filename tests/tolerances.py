"""How far an implementation may be from the float64 reference, and where the numbers come from.

``allowed`` measures what may be off: twice the error of plain attention in a 16-bit dtype on
the same values, and a floor of a few units of the output's own dtype. The two functions below it
bound float32 arithmetic from its unit, for implementations that round nothing to 16 bits.

A float32 dot product of n terms is off by at most n u |a||b| with u = 2^-24, and by about
sqrt(n) u in practice. Attention is two of them (head_dim, then context) with an exponential
between, which turns an absolute error of a score into a relative one of a weight.
"""

from dataclasses import dataclass

import torch

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import QuantSpec, rotate
from quantpage.ops.attend import AttendParams, reference
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.gather.reference import gather_request

FLOAT32_UNIT = 2.0**-24
FLOOR = 16
"""Units of the output's dtype, of the step's largest number, that any order of sums may cost."""


def rounding_error(spec: QuantSpec) -> float:
    """|held - x| / |x| that rows of normal numbers may have once they went through codes."""
    code = spec.code
    if code.is_float:
        # e4m3: half of 2^-3, and the scale's own rounding.
        return 0.04
    # A uniform error over even steps, of which a row's range of 10 deviations takes all.
    return 1e-6 if code.exact else 10 / 12**0.5 / (code.qmax - code.qmin)


@dataclass(frozen=True)
class Allowed:
    """What a step's results are, and how far off they may be."""

    want: torch.Tensor
    want_lse: torch.Tensor
    error: torch.Tensor
    """[q_heads, 1]: of a head's outputs."""
    lse_error: torch.Tensor

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """AssertionError says what is off, and by how much."""
        empty = self.want_lse.isneginf()
        assert torch.equal(lse.isneginf(), empty)
        assert out[empty].eq(0).all()
        if empty.all():
            return
        floor = FLOOR * torch.finfo(out.dtype).eps * self.want.abs().max()
        off = (out.double() - self.want).abs().amax(-1) - self.error[:, 0] - floor
        worst = (out.double() - self.want)[~empty].abs().max()
        over = off[~empty].max()
        assert over <= 0, f"output: error {worst:.3g}, {over:.3g} more than allowed"
        wrong = (lse.double() - self.want_lse)[~empty].abs()
        slack = FLOOR * FLOAT32_UNIT * (1 + self.want_lse[~empty].abs())
        assert (wrong <= self.lse_error + slack).all(), (
            f"log-sum-exp: error {wrong.max():.3g}, allowed {self.lse_error:.3g}"
        )


def allowed(
    q: torch.Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    low: torch.dtype = torch.float16,
    model_basis: bool = False,
) -> Allowed:
    """Twice the error of a run in ``low`` on the same values; a head's is that of its worst row,
    because single rows of the plain run may be lucky.

    model_basis: outputs are turned back, as attend's own argument says.
    """
    want, want_lse = reference.attend(q, layer, batch, params)
    plain, plain_lse = attend_in(low, q, layer, batch, params)
    if model_basis and layer.value.spec.rotation == "hadamard":
        want, plain = rotate(want), rotate(plain)
    seen = ~want_lse.isneginf()
    error = 2 * (plain - want).abs().amax((0, -1)).unsqueeze(-1)
    lse_error = 2 * (plain_lse - want_lse)[seen].abs().max() if seen.any() else torch.zeros(())
    return Allowed(want, want_lse, error, lse_error)


def assert_agrees(
    got: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    low: torch.dtype = torch.float16,
) -> None:
    """One result of a step, in the basis of the cache; see ``allowed``."""
    allowed(q, layer, batch, params, low).check(*got)


def attend_in(
    low: torch.dtype, q: torch.Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention whose inputs, scores, probabilities and output are ``low``; float64 back."""
    group = q.shape[1] // layer.kv_heads
    out = torch.zeros(*q.shape[:2], layer.value.head_dim, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    row = 0
    for request, (new, context) in enumerate(
        zip(batch.query_lens, batch.host_context_lens, strict=True)
    ):
        rows, row = slice(row, row + new), row + new
        positions = batch.positions[rows]
        near = exact_pairs(positions, torch.arange(context), batch.page_size)
        parts = [(layer, batch.page_table, ~near)]
        if layer.exact_key is None or batch.exact is None:
            parts = [(layer, batch.page_table, torch.ones_like(near))]
        else:
            parts.append((layer.exact(), batch.exact.page_table.clamp_min(0), near))
        for head in range(q.shape[1]):
            seen = params.mask.materialize(positions, context, request, head // group)
            own = q[rows, head].to(low)
            scores = torch.full(seen.shape, -torch.inf, dtype=low)
            values = []
            for each, table, shown in parts:
                k, v = (
                    gather_request(half, table[request], context, torch.float32)[:, head // group]
                    for half in (each.key, each.value)
                )
                s = (own @ k.to(low).T) * params.softmax_scale
                if params.softcap is not None:
                    s = torch.tanh(s / params.softcap) * params.softcap
                scores = torch.where(shown & seen, s, scores)
                # What no query of the step sees may be anything.
                values.append(torch.where((shown & seen).any(0)[:, None], v.to(low), 0.0))
            sink = torch.full((new, 1), -torch.inf, dtype=low)
            if params.sinks is not None:
                sink[:] = params.sinks[head]
            wide = torch.cat([scores, sink], 1)
            p = wide.softmax(-1).nan_to_num(0.0)[:, :-1]
            for (_, _, shown), v in zip(parts, values, strict=True):
                out[rows, head] += (p.masked_fill(~shown, 0.0) @ v).double()
            lse[rows, head] = wide.logsumexp(-1).double()
    return out, lse


def attention_atol(head_dim: int, context: int, values: float = 4.0) -> float:
    """Absolute error of an output whose values are at most ``values`` large.

    Scores are at most about 30 here, so that a score is off by 30 sqrt(head_dim) u and a weight
    relatively by as much; summing them over the context adds sqrt(context) u. A factor of 8
    covers the tail of the random walk.
    """
    score = 30 * head_dim**0.5 * FLOAT32_UNIT
    return 8 * values * (score + max(context, 1) ** 0.5 * FLOAT32_UNIT)


def lse_atol(head_dim: int) -> float:
    """Absolute error of a log-sum-exp up to about 40."""
    return 8 * (40 + 30 * head_dim**0.5) * FLOAT32_UNIT
