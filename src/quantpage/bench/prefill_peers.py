"""Kernels that read bfloat16 keys and values, for bench/prefill: contiguous, and in pages.

Pages are what a server has. A peer reads them by a page table of its own (cuDNN, through its
frontend package; FlashAttention-3, as vLLM ships it; FlexAttention, through a block mask), or torch
copies them to contiguous rows first (cuDNN after a gather). Contiguous rows are what no cache of
pages has: a bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from quantpage.bench.cases import PAGE, Case


@dataclass(frozen=True)
class Peer:
    """What is timed beside ours."""

    reads: str
    """'bf16' contiguous, or 'bf16 pages'."""
    call: Callable[[], Any]
    """Gives [requests, q_heads, new, head_dim]."""
    operations: float
    """That it is credited with: cuDNN through torch computes hidden pairs of a chunk too."""


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's cuDNN: no causal mask that ends at the last query, so that chunks run unmasked."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=causal)


def _cudnn(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """Over contiguous [requests, kv_heads, context, head_dim], as are the two after it."""
    return Peer(
        "bf16", lambda: cudnn_attention(q, k, v, case.whole), case.operations(causal=case.whole)
    )


def _flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    bias: Any = None if case.whole else causal_lower_right(case.new, case.context)

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=case.whole, enable_gqa=True
            )

    return Peer("bf16", call, case.operations(causal=True))


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    past = case.context - case.new

    def seen(b, h, i, j):
        return j <= i + past

    mask = create_block_mask(seen, None, None, case.new, case.context, device="cuda")
    compiled = torch.compile(flex_attention)
    return Peer(
        "bf16",
        lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True),
        case.operations(causal=True),
    )


def _shuffled(case: Case, size: int = PAGE) -> Tensor:
    """Page of every request's logical pages of ``size`` tokens, [requests, pages]."""
    pages = case.context // size
    return torch.randperm(case.requests * pages, device="cuda").view(case.requests, pages)


def _paged(rows: Tensor, order: Tensor, size: int = PAGE) -> Tensor:
    """[requests, kv_heads, context, D] -> [pages, kv_heads, size, D]; see ``_shuffled``."""
    cut = rows.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    made = torch.empty_like(cut, memory_format=torch.contiguous_format)
    made[order.flatten()] = cut
    return made


def _cudnn_gathered(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """torch copies pages [PAGE, kv_heads, D] to rows, one index_select each; then cuDNN."""
    order = _shuffled(case)
    # Tokens outside heads: one copy makes rows that cuDNN takes with their strides.
    pages = [_paged(rows, order).transpose(1, 2).contiguous() for rows in (k, v)]
    dense = [torch.empty_like(each) for each in pages]
    table = order.flatten()

    def call():
        for each, rows in zip(pages, dense, strict=True):
            torch.index_select(each, 0, table, out=rows)
        k, v = (rows.view(case.requests, -1, *rows.shape[2:]).transpose(1, 2) for rows in dense)
        return cudnn_attention(q, k, v, case.whole)

    return Peer("bf16 pages", call, case.operations(case.whole))


def _cudnn_paged(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """cuDNN reads the page table itself; its causal mask ends at the last query."""
    cudnn: Any = import_module("cudnn")
    handle = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    order, out = _shuffled(case), torch.empty_like(q)
    lengths = torch.ones(case.requests, 1, 1, 1, dtype=torch.int32, device="cuda")
    table = order.int().view(case.requests, 1, -1, 1)
    given = {
        "q": q,
        "k": _paged(k, order),
        "v": _paged(v, order),
        "paged_attention_k_table": table,
        "paged_attention_v_table": table.clone(),
        "seq_len_q": lengths * case.new,
        "seq_len_kv": lengths * case.context,
    }
    named = {name: graph.tensor_like(tensor) for name, tensor in given.items()}
    found, _ = graph.sdpa(
        **named,
        generate_stats=False,
        attn_scale=case.head_dim**-0.5,
        use_padding_mask=True,
        diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
        diagonal_band_right_bound=0,
        paged_attention_max_seq_len_kv=case.context,
    )
    found.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except cudnn.cudnnGraphNotSupportedError as refusal:
        raise RuntimeError(str(refusal)) from refusal
    pack = {named[name]: tensor for name, tensor in given.items()} | {found: out}
    space = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def call():
        graph.execute(pack, space, handle=handle)
        return out

    return Peer("bf16 pages", call, case.operations(causal=True))


def _flash3(case: Case, q: Tensor, k: Tensor, v: Tensor, size: int = 0) -> Peer:
    """vLLM's build of FlashAttention-3, causal to the last query, over contiguous rows or (size)
    pages of so many tokens."""
    attend: Any = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device="cuda")
    # Tokens outside heads, in rows and in pages.
    rows, *kv = (each.transpose(1, 2).flatten(0, 1).contiguous() for each in (q, k, v))
    where: dict[str, Tensor] = {"cu_seqlens_k": starts * case.context}
    if size:
        order = _shuffled(case, size)
        kv = [_paged(each, order, size).transpose(1, 2).contiguous() for each in (k, v)]
        used = torch.full_like(starts[1:], case.context)
        where = {"seqused_k": used, "block_table": order.int()}
    lens = (case.new, starts * case.new, case.context)

    def call():
        out = attend(rows, *kv, *lens, causal=True, fa_version=3, **where)
        return out.unflatten(0, (case.requests, case.new)).transpose(1, 2)

    return Peer("bf16 pages" if size else "bf16", call, case.operations(causal=True))


def _flex_paged(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """FlexAttention over pages that lie in any order: its block mask names them."""
    past = case.context - case.new
    order = _shuffled(case)[0]
    inverse = order.argsort()

    def seen(b, h, i, j):
        return j <= i + past

    def seen_there(b, h, i, j):
        return inverse[j // PAGE] * PAGE + j % PAGE <= i + past

    size = (128, PAGE)
    plain = create_block_mask(
        seen, None, None, case.new, case.context, device="cuda", BLOCK_SIZE=size
    )
    table = order.int()
    mask = BlockMask.from_kv_blocks(
        plain.kv_num_blocks,
        table[plain.kv_indices.long()],
        plain.full_kv_num_blocks,
        None if plain.full_kv_indices is None else table[plain.full_kv_indices.long()],
        BLOCK_SIZE=size,
        mask_mod=seen_there,
        seq_lengths=(case.new, case.context),
    )
    pages = [
        _paged(rows, order).transpose(0, 1).flatten(1, 2)[None].contiguous() for rows in (k, v)
    ]
    compiled = torch.compile(flex_attention)
    return Peer(
        "bf16 pages",
        lambda: compiled(q, pages[0], pages[1], block_mask=mask, enable_gqa=True),
        case.operations(causal=True),
    )


PEERS: dict[str, Callable[[Case, Tensor, Tensor, Tensor], Peer]] = {
    "cuDNN": _cudnn,
    "FlashAttention-2": _flash,
    "FlashAttention-3": _flash3,
    "FlexAttention": _flex,
    "cuDNN after a gather": _cudnn_gathered,
    "cuDNN, page table": _cudnn_paged,
    "FlashAttention-3, pages of 64": partial(_flash3, size=64),
    "FlashAttention-3, pages of 128": partial(_flash3, size=128),
    "FlexAttention, block mask": _flex_paged,
}
"""From q [requests, q_heads, new, head_dim] and contiguous k and v; RuntimeError refuses."""
