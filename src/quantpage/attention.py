"""Attention backends: a write op, an attend op, and the masks that they accept.

``build_attention`` chooses the implementations of one layer once; the result is called at every
step. Queries and keys go into the basis of the cache when they are written, and outputs leave it in
attend.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.errors import NoImplementation
from quantpage.masks import Mask
from quantpage.ops import attend as attend_op
from quantpage.ops import rope_write as write_op
from quantpage.ops.attend import AttendParams
from quantpage.ops.checks import check_attend, check_out, needs_of
from quantpage.ops.dispatch import Call, Implementation, Phase, find, phase_of
from quantpage.ops.rope_write import WriteParams, Written
from quantpage.ops.rows import Keys, Outputs, Queries, Values


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """A name that users choose and the kinds of mask behind it."""

    name: str
    mask_kinds: tuple[str, ...]
    """What ``Mask.kind`` may be."""

    def refusals(self, mask: Mask) -> list[str]:
        """Why this backend cannot serve ``mask``; empty when it can."""
        if mask.kind in self.mask_kinds:
            return []
        accepted = " or ".join(self.mask_kinds)
        return [f"backend {self.name} takes a {accepted} mask, got {mask.kind}."]


_MOST_PARTS = 4
"""Of a step: more launches than this cost what a decode kernel gains."""

BACKENDS: dict[str, AttentionBackend] = {
    each.name: each
    for each in (
        AttentionBackend("flash", ("causal", "full")),
        AttentionBackend("flash_mask", ("causal", "full", "interval", "asked")),
    )
}


class Attended(NamedTuple):
    """What a layer's attention hands back."""

    out: Tensor
    """[tokens, q_heads, out_dim] in the query's dtype."""
    lse: Tensor | None
    """[tokens, q_heads], natural logarithm, at least float32; None where it was not wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """The implementations that serve one layer: what ``call`` says of it must hold at each step.

    query_dim and out_dim are head_dim and value_dim but where keys and values are made of latent
    rows (``LayerKV.latent``).
    """

    backend: AttentionBackend
    write: Implementation
    prefill: Implementation
    decode: Implementation
    call: Call

    def write_step(
        self, q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan,
        params: WriteParams,
    ) -> Written:  # fmt: skip
        """Write a step's keys and values; hand the query back in the basis of the cache.

        Raises ValueError for what does not belong together, before anything is written.
        """
        self._check(layer, batch, None)
        return self.write.load()(q, k, v, layer, batch, params)

    def attend_step(
        self,
        q: Queries,
        layer: LayerKV,
        batch: BatchPlan,
        params: AttendParams,
        lse_wanted: bool = True,
        out: Outputs | None = None,
    ) -> Attended:
        """Attend to what the pages hold; ``q`` as ``write_step`` handed it back.

        lse_wanted, out: as in ``ops.attend.attend``. Raises ValueError for what does not belong
        together, before anything runs.
        """
        self._check(layer, batch, params)
        if self._in_parts(layer, batch, params):
            return self._attend_parts(q, layer, batch, params, lse_wanted, out)
        chosen = self._serving(batch)
        return Attended(*attend_op.attend(q, layer, batch, params, chosen, True, lse_wanted, out))

    def _in_parts(self, layer: LayerKV, batch: BatchPlan, params: AttendParams) -> bool:
        """Whether requests of few tokens stand beside prompts over exact pages.

        A decode kernel takes a row over codes and exact pages; a prompt's kernels would read a
        whole context for it. (Without exact pages they cut a step themselves:
        ops/attend/prefill/ways.)
        """
        return (
            layer.exact_key is not None
            and self.decode.joins
            and self.prefill is not self.decode
            and params.facts.mask_batch == 1
            and 1 < len(_parts(batch.query_lens)) <= _MOST_PARTS
        )

    def _attend_parts(
        self, q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, lse_wanted: bool,
        out: Tensor | None,
    ) -> Attended:  # fmt: skip
        """Neighbours of one kind by a call of their own."""
        check_attend(q, layer, batch, params, needs_of(self.prefill.load()))
        if out is None:
            out = q.new_empty(*q.shape[:2], layer.facts.out_dim)
        check_out(out, q, layer.facts.out_dim)
        lses, row = [], 0
        for first, end in _parts(batch.query_lens):
            own = batch.part(first, end)
            rows = slice(row, row + own.num_tokens)
            row = rows.stop
            _, lse = attend_op.attend(
                q[rows], layer, own, params, self._serving(own), True, lse_wanted, out[rows]
            )
            lses.append(lse)
        return Attended(out, torch.cat([x for x in lses if x is not None]) if lse_wanted else None)

    def reserve(
        self, max_requests: int, max_tokens: int, device: torch.device | str | None = None
    ) -> int:
        """Hold the memory that launches keep, for steps up to this size; its bytes.

        For the calling thread on the current stream. Call it before memory is measured and before
        a step is captured, so that none is allocated then. What a prefill works in comes from
        torch's allocator and goes back to it. device: None: the current one of the kind that this
        attention was built for. Raises ValueError for sizes below 1.
        """
        for name, most in (("max_requests", max_requests), ("max_tokens", max_tokens)):
            if most < 1:
                raise ValueError(f"{name}: expected at least 1, got {most}")
        where = torch.device(self.call.device.kind if device is None else device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        functions = {each.load_reserve() for each in (self.prefill, self.decode)}
        return sum(
            run(self.call, where, max_requests, max_tokens) for run in functions if run is not None
        )

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        layer: LayerKV,
        batch: BatchPlan,
        write: WriteParams,
        attend: AttendParams,
    ) -> Attended:
        """One layer's step: write, then attend to the cache, the new tokens included."""
        self._check_before(q, layer, batch, attend)
        written = self.write_step(q, k, v, layer, batch, write)
        assert written.q is not None
        return self.attend_step(written.q, layer, batch, attend)

    def into(
        self,
        out: Outputs,
        qkv: tuple[Tensor, Tensor, Tensor],
        layer: LayerKV,
        batch: BatchPlan,
        write: WriteParams,
        attend: AttendParams,
    ) -> None:
        """The same with the output in the caller's memory and without a log-sum-exp."""
        q, k, v = qkv
        self._check_before(q, layer, batch, attend)
        check_out(out, q, layer.facts.out_dim)
        written = self.write_step(q, k, v, layer, batch, write)
        assert written.q is not None
        self.attend_step(written.q, layer, batch, attend, lse_wanted=False, out=out)

    def _check_before(
        self, q: Tensor, layer: LayerKV, batch: BatchPlan, attend: AttendParams
    ) -> None:
        """What attend would refuse must not have been written."""
        self._check(layer, batch, attend)
        check_attend(q, layer, batch, attend, needs_of(self._serving(batch).load()))

    def _serving(self, batch: BatchPlan) -> Implementation:
        return self.decode if phase_of(batch.max_query_len) == "decode" else self.prefill

    def _check(self, layer: LayerKV, batch: BatchPlan, params: AttendParams | None) -> None:
        """The layer and the mask are those that the implementations were chosen for."""
        key = (self, layer.facts, None if params is None else params.facts)
        if key in batch.passed:
            return
        call, facts = self.call, layer.facts
        wanted = (call.kv_heads, call.head_dim, call.value_head_dim, call.page_size)
        got = (facts.kv_heads, facts.head_dim, facts.value_head_dim, facts.page_size)
        if wanted != got:
            raise ValueError(
                f"layer: expected kv_heads, head_dim, value_head_dim, page_size {wanted}, as this "
                f"attention was built for, got {got}"
            )
        if call.latent != facts.latent:
            kinds = "keys and values", "latent rows"
            raise ValueError(
                f"layer: expected {kinds[call.latent]}, as this attention was built for, got "
                f"{kinds[facts.latent]}"
            )
        if (call.format.key, call.format.value) != (facts.key, facts.value):
            raise ValueError(
                f"layer: expected pages of format {call.format.name}, as this attention was built "
                f"for, got {facts.key} and {facts.value}"
            )
        near = call.format.near
        if (None if near is None else (near.key, near.value)) != facts.near:
            raise ValueError(
                f"layer: expected exact pages in {'16 bits' if near is None else near.name}, as "
                f"this attention was built for, got {facts.near or '16 bits'}"
            )
        if (call.format.exact_pages is None) != (facts.exact_pages is None):
            have = "none" if facts.exact_pages is None else "some"
            raise ValueError(f"layer: expected exact pages as {call.format.name} has, got {have}")
        if params is not None and params.mask.kind != call.mask:
            raise ValueError(
                f"mask: expected a {call.mask} one, as this attention was built for, "
                f"got {params.mask.kind}"
            )
        batch.passed.add(key)


@lru_cache(maxsize=32)
def _parts(query_lens: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First request and end of the neighbours that decode, or that are prompts.

    Who has no new tokens belongs to those before.
    """
    kinds: list[Phase] = []
    for new in query_lens:
        kinds.append(phase_of(new) if new or not kinds else kinds[-1])
    ends = accumulate(len([*same]) for _, same in groupby(kinds))
    return tuple(pairwise([0, *ends]))


def find_backend(name: str) -> AttentionBackend:
    """The backend called ``name``; ValueError lists the names there are."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return BACKENDS[name]


def build_attention(
    backend: AttentionBackend | str, mask: Mask, call: Call, implementation: str | None = None
) -> LayerAttention:
    """Choose what serves ``call`` under ``mask``.

    backend: one of BACKENDS, or its name. implementation: a name that both ops' candidates know
    ('torch', 'cpu', 'triton'), used for both and never replaced; None: the first that does not
    refuse. Raises NoImplementation, and ValueError for a name that no backend has.
    """
    if isinstance(backend, str):
        backend = find_backend(backend)
    refused = backend.refusals(mask)
    if refused:
        raise NoImplementation(" ".join(refused))
    call = replace(call, mask=mask.kind)
    return LayerAttention(
        backend,
        write=find(write_op.CANDIDATES, call, implementation),
        prefill=find(attend_op.CANDIDATES, replace(call, phase="prefill"), implementation),
        decode=find(attend_op.CANDIDATES, replace(call, phase="decode"), implementation),
        call=call,
    )
