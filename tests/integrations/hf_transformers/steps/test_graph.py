"""Decode as a CUDA graph equals decode step by step."""

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

import quantpage
from quantpage.errors import PartlyPaged, UnsupportedModel
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.steps.graph import DecodeGraph
from tests.integrations.tiny_models import COMMON, tiny, tokens
from tests.ops.triton_cases import KERNEL_FORMATS

pytestmark = pytest.mark.gpu
DYNAMIC = [name for name in KERNEL_FORMATS if FORMATS[name].dynamic]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_format", DYNAMIC)
def test_a_replayed_step_equals_an_eager_one(kv_format):
    model = tiny("llama", torch.float16).cuda()
    ids, steps = tokens(3, 45).cuda(), 40
    with quantpage.attach(model, kv_format=kv_format, page_size=16), torch.inference_mode():
        out = model(ids, use_cache=True)
        first = out.logits[:, -1].argmax(-1)
        graph = DecodeGraph(model, out.past_key_values, first, steps)
        replayed = torch.cat([first[:, None], graph.run(steps)], 1)
        out = model(torch.cat([ids, replayed[:, :-1]], 1), use_cache=True)
    wanted = out.logits[:, ids.shape[1] - 1 :]
    # Teacher-forced: near ties may fall either way, nothing else may differ.
    chosen = wanted.gather(-1, replayed[..., None])[..., 0]
    assert (wanted.amax(-1) - chosen).max() < 0.15
    assert (wanted.argmax(-1) == replayed).float().mean() > 0.9


def test_what_cannot_be_captured_is_refused():
    with quantpage.attach(tiny("llama"), page_size=16) as attached:
        cache = attached.new_cache()
        with pytest.raises(ValueError, match="last_tokens: expected a CUDA tensor, got cpu"):
            DecodeGraph(attached.model, cache, torch.zeros(2), 4)
    config = Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"])
    with pytest.warns(PartlyPaged), quantpage.attach(Lfm2ForCausalLM(config).eval()) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedModel, match="layer 0: expected keys and values in pages"):
            DecodeGraph(attached.model, cache, torch.zeros(2), 4)
