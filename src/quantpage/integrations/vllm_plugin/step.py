"""vLLM's metadata of a step -> a ``BatchPlan``, once a step and page size."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)

from quantpage.batch import BatchPlan, ExactPlan, derive
from quantpage.batch_values import places_of
from quantpage.cache import PAGE_SIZES
from quantpage.integrations.vllm_plugin.formats import EXACT_PAGES, LONG_CHUNK
from quantpage.integrations.vllm_plugin.working import WorkingPages, plan_working


def kernel_pages(spec: object) -> list[int]:
    """Tokens of a page as kernels see it: one of these that divides a block of vLLM's.

    Where exact pages are kept both kinds have one size, which ``customize_spec`` has written into
    the spec. vLLM itself writes the largest size there where nobody did.
    """
    held = getattr(spec, "block_stride_alignment", None)
    if isinstance(held, MultipleOf) and held.base in EXACT_PAGES:
        return [held.base]
    return list(PAGE_SIZES)


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring requests of a step that are written and attended to by calls of their own."""

    rows: slice
    """Their tokens."""
    plan: BatchPlan
    working: WorkingPages | None = None
    """What each layer works in; None: in vLLM's pages."""


@dataclass
class Step(AttentionMetadata):
    """What the layers of one cache group share in one step."""

    plan: BatchPlan
    causal: bool
    _with_exact: tuple[Part, ...] = field(default=(), init=False)

    def with_exact(self, page_table: Tensor, slots: Tensor) -> tuple[Part, ...]:
        """The step over exact pages too; made by the first layer that asks.

        page_table: [requests, max_pages]; slots: [tokens or more]. Requests with long chunks, which
        run in working pages, stand at the end in a runner that sorts them; in one that does not,
        all requests run so.
        """
        if not self._with_exact:
            plan = self.plan
            near = ExactPlan(page_table, slots[: plan.num_tokens])
            long = [new > LONG_CHUNK for new in plan.query_lens]
            first = len(long) - sum(long)
            if not all(long[first:]):
                first = 0
            parts = []
            if first:
                cut = sum(plan.query_lens[:first])
                own = plan if first == len(long) else some_requests(plan, 0, first)
                near = ExactPlan(page_table[:first], near.slots[:cut])
                parts.append(Part(slice(0, cut), derive(own, exact=near)))
            if first < len(long):
                rest = plan if first == 0 else some_requests(plan, first, len(long))
                over, working = plan_working(rest, page_table[first:])
                rows = slice(plan.num_tokens - rest.num_tokens, plan.num_tokens)
                parts.append(Part(rows, over, working))
            self._with_exact = tuple(parts)
        return self._with_exact


def some_requests(plan: BatchPlan, first: int, end: int) -> BatchPlan:
    """The step of the requests first..end (exclusive) alone, its rows counted from their first."""
    rows = slice(sum(plan.query_lens[:first]), sum(plan.query_lens[:end]))
    starts = plan.query_starts[first : end + 1]
    tensors = {
        "query_starts": starts - rows.start if rows.start else starts,
        "context_lens": plan.context_lens[first:end],
        "page_table": plan.page_table[first:end],
        "slots": plan.slots[rows],
        "positions": plan.positions[rows],
    }
    if first:
        # Kernels are compiled for addresses that are multiples of 16 bytes.
        tensors = {name: each.clone() for name, each in tensors.items()}
    return derive(
        plan,
        query_lens=plan.query_lens[first:end],
        host_context_lens=plan.host_context_lens[first:end],
        **tensors,
    )


class StepBuilder(AttentionMetadataBuilder[Step]):
    """One a cache group."""

    # Decode kernels take batches of one length up to 16 tokens, drafts included.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        sizes, block = kernel_pages(kv_cache_spec), kv_cache_spec.block_size
        self.page_size = block if block in sizes else max(s for s in sizes if block % s == 0)
        self.longest = vllm_config.model_config.max_model_len
        self._empty = _empty_plan(self.page_size, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        """The step that vLLM describes."""
        return self._step(common_attn_metadata, longest=None)

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """A step to capture: a graph is replayed with contexts of any length, so what the host
        chooses from them must fit the longest."""
        return self._step(common_attn_metadata, longest=self.longest)

    def _step(self, given, longest: int | None) -> Step:
        """longest: tokens of every context; None: as ``given`` says.

        Plans are derived, not built: a request may hit pages that another one writes in this very
        step, which a plan made by hand is refused for. Impl writes all rows before it attends.
        """
        starts = given.query_start_loc_cpu.tolist()
        query_lens = tuple(b - a for a, b in pairwise(starts))
        contexts = self._contexts(given, len(query_lens), longest)
        tokens = starts[-1]
        plan = derive(
            self._empty,
            query_starts=given.query_start_loc,
            context_lens=given.seq_lens,
            page_table=given.block_table_tensor,
            # Padded at the end: for a graph, and by vLLM with -1.
            slots=given.slot_mapping[:tokens],
            positions=self._positions(given, query_lens, contexts),
            query_lens=query_lens,
            host_context_lens=contexts,
            largest_page=None,
        )
        return Step(plan, bool(given.causal))

    def _contexts(self, given, requests: int, longest: int | None) -> tuple[int, ...]:
        if longest is not None:
            return (longest,) * requests
        if given.seq_lens.device.type == "cpu":
            return tuple(given.seq_lens.tolist())
        bounds = given.seq_lens_cpu_upper_bound
        return (self.longest,) * requests if bounds is None else tuple(bounds.tolist())

    def _positions(self, given, query_lens: tuple[int, ...], contexts: tuple[int, ...]) -> Tensor:
        """int64 [tokens].

        Kernels for a GPU read them only to rotate, which vLLM's models do themselves, and a graph
        could not replay them: there, any tensor of their shape stands for them.
        """
        if given.seq_lens.device.type != "cpu":
            return given.slot_mapping[: sum(query_lens)]
        _, positions = places_of(*(torch.tensor(each).numpy() for each in (query_lens, contexts)))
        return torch.from_numpy(positions)


def _empty_plan(page_size: int, device: torch.device) -> BatchPlan:
    """A checked step of no requests, from which steps are derived."""

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return BatchPlan(
        query_starts=zeros(torch.int32, 1),
        context_lens=zeros(torch.int32, 0),
        page_table=zeros(torch.int32, 0, 1),
        slots=zeros(torch.int64, 0),
        positions=zeros(torch.int64, 0),
        page_size=page_size,
        query_lens=(),
        host_context_lens=(),
    )
