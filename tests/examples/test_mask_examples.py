"""The mask examples on a small random model: their claims, not their output."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.examples.loading import example

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


class Letters:
    """A tokenizer of bytes."""

    def __call__(self, text, return_tensors=None):
        ids = list(text.encode())
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)


@pytest.mark.parametrize("kv_format", ["none", "int8", "fp8"])
def test_packed_documents_equal_one_by_one(model, kv_format):
    packed, alone = example("packed_documents").compare(model.double(), Letters(), kv_format)
    assert alone.abs().max() > 1
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-6)


def test_spans_equal_dense_attention(model):
    spans = example("bidirectional_spans")
    model = model.float()
    ids, found = spans.find_spans(Letters(), spans.TEXT)
    assert len(found) == 2
    mask = spans.image_spans(ids.shape[1], found)
    ours, theirs = spans.prompt_logits(model, ids, mask, "none")
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    causal = model(ids, use_cache=False).logits[0]
    assert (causal - theirs).abs().max() > 0.05


def test_examples_are_runnable_files():
    assert "packed_documents" not in sys.modules
    for name in ("packed_documents", "bidirectional_spans"):
        assert callable(example(name).main)
