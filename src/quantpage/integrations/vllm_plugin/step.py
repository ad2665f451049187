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

from quantpage.batch import BatchPlan, derive
from quantpage.batch.checks import places_of
from quantpage.cache import PAGE_SIZES
from quantpage.integrations.vllm_plugin.exact_layer import ExactStep
from quantpage.integrations.vllm_plugin.formats import EXACT_PAGES
from quantpage.integrations.vllm_plugin.parts import Part, parts_of


def kernel_pages(spec: object) -> list[int | MultipleOf]:
    """Tokens of a page as kernels see it: one of these that divides a block of vLLM's.

    Where exact pages are kept both kinds have one size, which ``customize_spec`` has written into
    the spec. vLLM itself writes the largest size there where nobody did. For layers with a window
    it asks by a spec of one token which size of a block it may choose.
    """
    held = getattr(spec, "block_stride_alignment", None)
    if isinstance(held, MultipleOf) and held.base in EXACT_PAGES:
        return [held if is_probe(spec) else held.base]
    return list(PAGE_SIZES)


def is_probe(spec: object) -> bool:
    """Whether a spec is of no pages that will be, but a question about a token's bytes."""
    return getattr(spec, "block_size", 0) == 1


@dataclass
class Step(AttentionMetadata):
    """What the layers of one cache group share in one step."""

    plan: BatchPlan
    causal: bool
    _with_exact: dict[ExactStep, tuple[Part, ...]] = field(default_factory=dict, init=False)

    def with_exact(self, near: ExactStep) -> tuple[Part, ...]:
        """The step over exact pages too; made by the first layer that asks.

        near: of the group in which the layer's exact pages are. Layers that share codes' tables may
        be in several, where a model has layers of two kinds.
        """
        parts = self._with_exact.get(near)
        if parts is None:
            parts = self._with_exact[near] = parts_of(self.plan, near.page_table, near.slots)
        return parts


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
