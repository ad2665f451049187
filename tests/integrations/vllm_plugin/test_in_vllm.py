"""The plugin's parts inside an installed vLLM; whole answers are scripts/vllm_plugin/check.sh's."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention.attention import _largest_kernel_block_within
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from quantpage.batch import plan_batch
from quantpage.formats import FORMATS
from quantpage.integrations.vllm_plugin import compat, register
from quantpage.integrations.vllm_plugin.backend import QuantPageBackend
from quantpage.integrations.vllm_plugin.exact import ExactPagesManager, ExactPagesSpec
from quantpage.integrations.vllm_plugin.exact_layer import ExactStep
from quantpage.integrations.vllm_plugin.impl import Served
from quantpage.integrations.vllm_plugin.step import StepBuilder

pytestmark = pytest.mark.cpu


def test_registering_again_changes_nothing():
    for _ in range(2):
        register()
        member = AttentionBackendEnum[compat.backend_name()]
        assert member.get_class() is QuantPageBackend
    assert KVCacheSpecRegistry.get_manager_class(exact_spec(16)) is ExactPagesManager


def exact_spec(page: int) -> ExactPagesSpec:
    return ExactPagesSpec(
        block_size=page, num_kv_heads=2, head_size=64, dtype=torch.int8, sliding_window=2 * page
    )


def test_the_runner_is_told_to_leave_the_first_page_in_the_table():
    # 0.33 nulls what lies further back than this, where it is above 0 (worker/gpu/block_table.py).
    assert exact_spec(16).num_retained_tokens == 0


def spec(block_size: int, **other) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=2, head_size=128, dtype=torch.int8, **other
    )


@pytest.mark.parametrize(
    ("name", "block", "content", "page"), [("int8", 16, 260, 16), ("int4", 256, 136, 64)]
)
def test_bytes_and_pages_of_a_spec(monkeypatch, name, block, content, page):
    monkeypatch.setattr(Served, "last", Served(FORMATS[name], torch.bfloat16))
    made = QuantPageBackend.customize_spec(
        spec(block, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)
    )
    assert made.state_content_bytes == content and made.page_size_bytes == 2 * block * content
    assert page in QuantPageBackend.get_supported_kernel_block_sizes(made)
    # Layers that are left out keep the model's dtype.
    plain = spec(block)
    assert QuantPageBackend.customize_spec(plain) is plain


@pytest.mark.parametrize(
    ("name", "block", "wanted"),
    [("int4", 256, 256), ("int4", 192, 192), ("k8v4", 192, 192), ("int8", 64, 64)],
)
def test_blocks_of_layers_with_a_window_are_as_large_as_the_others(
    monkeypatch, name, block, wanted
):
    monkeypatch.setattr(Served, "last", Served(FORMATS[name], torch.bfloat16, block))
    mode = KVQuantMode.INT8_PER_TOKEN_HEAD
    probe = QuantPageBackend.customize_spec(window_spec(1, kv_quant_mode=mode))
    token = probe.real_page_size_bytes
    size = _largest_kernel_block_within(QuantPageBackend, token, token * block, block, probe)
    assert size == wanted
    # And they are cut into the pages that the others are cut into.
    made, other = (
        QuantPageBackend.customize_spec(make(size, kv_quant_mode=mode))
        for make in (window_spec, spec)
    )
    pages = QuantPageBackend.get_supported_kernel_block_sizes
    assert pages(made) == pages(other)
    assert made.page_size_bytes == other.page_size_bytes


def window_spec(block_size: int, **other) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=2, head_size=128, dtype=torch.int8,
        sliding_window=100, **other,
    )  # fmt: skip


def test_a_step_of_vllms_is_a_plan_of_ours():
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    builder = StepBuilder(spec(32), ["layer"], config, torch.device("cpu"))
    news, contexts, tables = (3, 1), (35, 20), [[4, 9], [2, 0]]
    wanted = plan_batch(news, contexts, tables, 32)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    given = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        num_reqs=2,
        # Padded, as vLLM pads.
        num_actual_tokens=8,
        max_query_len=3,
        max_seq_len=35,
        block_table_tensor=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.cat([wanted.slots, torch.full((4,), -1)]),
    )
    plan = builder.build(0, given).plan
    assert plan.query_lens == news and plan.host_context_lens == contexts
    assert plan.page_size == 32 and plan.num_tokens == 4
    for name in ("query_starts", "context_lens", "page_table", "slots", "positions"):
        assert torch.equal(getattr(plan, name), getattr(wanted, name)), name
    captured = builder.build_for_cudagraph_capture(given).plan
    assert captured.host_context_lens == (512, 512)
    step = builder.build(0, given)
    near, other = (ExactStep(given.block_table_tensor + i, given.slot_mapping) for i in range(2))
    exact = step.with_exact(near)
    assert exact is step.with_exact(near)
    (part,) = exact
    assert part.plan.exact.slots.shape == (4,) and step.plan.exact is None
    # Layers whose exact pages are in another group have that one's.
    (part,) = step.with_exact(other)
    assert torch.equal(part.plan.exact.page_table, given.block_table_tensor + 1)


def test_drafts_of_a_model_have_a_cache():
    from vllm.config import SpeculativeConfig

    methods = {"eagle": True, "mtp": True, "draft_model": True, "ngram": False, "medusa": False}
    for method, has in methods.items():
        given = object.__new__(SpeculativeConfig)
        given.method = method
        assert compat.drafts_by_model(SimpleNamespace(speculative_config=given)) == has
    assert not compat.drafts_by_model(SimpleNamespace(speculative_config=None))


@pytest.mark.parametrize(
    ("mode", "warms", "newer", "runs"),
    [
        (CUDAGraphMode.FULL_DECODE_ONLY, False, False, True),
        (CUDAGraphMode.NONE, True, True, True),
        (CUDAGraphMode.NONE, True, False, False),
        (CUDAGraphMode.NONE, False, True, False),
        (None, False, False, False),
    ],
)
def test_when_kernels_can_be_compiled_before_the_first_request(mode, warms, newer, runs):
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        kernel_config=SimpleNamespace(enable_jit_warmup=warms),
        use_v2_model_runner=newer,
    )
    assert compat.runs_first_steps(config) == runs
