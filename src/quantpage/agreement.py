"""How far attention may be from float64, measured: what tests and benches hold a kernel to.

``allowed`` is twice the error of plain attention in a 16-bit dtype on the same values, plus what
float32 sums in any order and the rounding of the output cost. No number is chosen for a shape, a
format or a mask: what is hard to compute in 16 bits may be off by more.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import rotate
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.checks import unchecked
from quantpage.ops.gather.reference import gather_request

FLOAT32_UNIT = 2.0**-24
FLOOR = 32
"""Units of float32, of the step's largest number, that any order of sums may cost."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a step's results are, and how far off they may be."""

    want: Float[Tensor, "tokens q_heads value_dim"]
    """In float64, as ``want_lse``."""
    want_lse: Float[Tensor, "tokens q_heads"]
    error: Float[Tensor, " q_heads"]
    """Of a head's outputs."""
    lse_error: float

    def wrong(
        self,
        out: Float[Tensor, "tokens q_heads value_dim"],
        lse: Float[Tensor, "tokens q_heads"] | None = None,
    ) -> str:
        """What is off and by how much; '' where nothing is. A number that is not finite is."""
        out = out.to(self.want.device)
        empty = self.want_lse.isneginf()
        if lse is not None and not torch.equal(lse.to(empty.device).isneginf(), empty):
            return "log-sum-exp: expected -inf where a query sees nothing, and only there"
        if out[empty].ne(0).any():
            return "output: expected 0 where a query sees nothing"
        if empty.all():
            return ""
        largest = self.want.abs().max()
        floor = (FLOOR * FLOAT32_UNIT + torch.finfo(out.dtype).eps / 2) * largest
        off = (out.double() - self.want).abs().amax(-1)
        over = (off - self.error - floor)[~empty].max()
        if not over <= 0:
            return f"output: error {off[~empty].max():.3g}, {over:.3g} more than allowed"
        if lse is not None:
            seen = self.want_lse[~empty]
            wrong = (lse.to(seen.device)[~empty].double() - seen).abs()
            if not (wrong <= self.lse_error + FLOOR * FLOAT32_UNIT * (1 + seen.abs())).all():
                return f"log-sum-exp: error {wrong.max():.3g}, allowed {self.lse_error:.3g}"
        return ""


def allowed(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    low: torch.dtype = torch.float16,
    model_basis: bool = False,
) -> Allowed:
    """Twice the error of a run in ``low``, on the device of ``q``.

    A head's is that of its worst row, because single rows of the plain run may be lucky.
    model_basis: outputs are turned back, as attend's own argument says.
    """
    want, want_lse = plain_attention(torch.float64, q, layer, batch, params)
    plain, plain_lse = plain_attention(low, q, layer, batch, params)
    if model_basis and layer.out_rotated:
        want, plain = rotate(want), rotate(plain)
    seen = ~want_lse.isneginf()
    error = 2 * (plain - want).abs().amax((0, -1))
    lse_error = 2 * (plain_lse - want_lse)[seen].abs().max().item() if seen.any() else 0.0
    return Allowed(want, want_lse, error, lse_error)


def plain_attention(
    dtype: torch.dtype, q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams
) -> tuple[Tensor, Tensor]:
    """Attention whose inputs, scores, probabilities and output are ``dtype``; float64 back.

    In the basis of the cache, on the device of ``q``. In float64 it is the reference of
    ops/attend for finite numbers, faster and on any device (tests/test_agreement.py).
    """
    tokens, q_heads, _ = q.shape
    group = q_heads // layer.kv_heads
    out = q.new_zeros(tokens, q_heads, layer.facts.out_dim, dtype=torch.float64)
    lse = q.new_full((tokens, q_heads), -torch.inf, dtype=torch.float64)
    row = 0
    for request, (new, context) in enumerate(
        zip(batch.query_lens, batch.host_context_lens, strict=True)
    ):
        rows, row = slice(row, row + new), row + new
        positions = batch.positions[rows].cpu()
        near = exact_pairs(positions, torch.arange(context, device="cpu"), batch.page_size).to(
            q.device
        )
        parts = _parts(layer, batch, request, context)
        shown = (torch.ones_like(near),) if len(parts) == 1 else (~near, near)
        for head in range(layer.kv_heads):
            seen = params.mask.materialize(positions, context, request, head).to(q.device)
            heads = slice(head * group, (head + 1) * group)
            # A row a query head and token.
            own = q[rows, heads].transpose(0, 1).flatten(0, 1).to(dtype)
            scores, values = own.new_full((len(own), context), -torch.inf), []
            for (k, v), mine in zip(parts, shown, strict=True):
                s = (own @ k[:, head].to(dtype).T) * params.softmax_scale
                if params.softcap is not None:
                    s = torch.tanh(s / params.softcap) * params.softcap
                scores = torch.where((mine & seen).repeat(group, 1), s, scores)
                # What no query of the step sees may be anything.
                read = (mine & seen).any(0)[:, None]
                values.append(torch.where(read, v[:, head].to(dtype), 0.0))
            sink = own.new_full((len(own), 1), -torch.inf)
            if params.sinks is not None:
                sink[:, 0] = params.sinks[heads].to(q.device, dtype).repeat_interleave(new)
            wide = torch.cat([scores, sink], 1)
            weights = wide.softmax(-1).nan_to_num(0.0)[:, :-1]
            for mine, v in zip(shown, values, strict=True):
                made = (weights.masked_fill(~mine.repeat(group, 1), 0.0) @ v).double()
                out[rows, heads] += made.unflatten(0, (group, new)).transpose(0, 1)
            lse[rows, heads] = wide.logsumexp(-1).double().view(group, new).T
    return out, lse


def _parts(
    layer: LayerKV, batch: BatchPlan, request: int, context: int
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [context, kv_heads, dim] of a request, and those of its exact pages."""
    given = [(layer, batch.page_table[request])]
    if layer.exact_key is not None and batch.exact is not None:
        given.append((layer.exact(), batch.exact.page_table[request].clamp_min(0)))
    gather, parts = unchecked(gather_request), []
    for each, table in given:
        k, v = (gather(half, table, context, torch.float64) for half in (each.key, each.value))
        # A latent row is the value, and the first channels of the key.
        parts.append((torch.cat([k, v], -1), k) if layer.latent else (k, v))
    return parts
