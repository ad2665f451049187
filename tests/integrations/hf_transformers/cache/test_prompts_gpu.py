"""Known beginnings on a GPU: kernels over shared and loaded pages, and graphs over them."""

import pytest
import torch

import quantpage
from quantpage.errors import CacheError
from quantpage.integrations.hf_transformers.steps.graph import DecodeGraph
from tests.integrations.hf_transformers.cache.prompt_cases import FORMS, PAGE, SYSTEM
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_format", FORMS)
def test_known_beginnings_on_a_gpu(kv_format, tmp_path):
    model = tiny("llama", torch.float16).cuda()
    system = SYSTEM.clamp(3, 127).cuda()
    ids = torch.cat([system, tokens(1, 40).clamp(3, 127).cuda()], 1)
    with quantpage.attach(model, kv_format, page_size=PAGE) as attached, torch.inference_mode():
        wanted = model(ids).logits[0, -1]
        prompts = attached.prompts()
        prompts.learn(system)
        prompt = attached.new_cache()
        model(system, past_key_values=prompt)
        attached.save_cache(prompt, tmp_path / "file")
        for cache in (
            prompts.new_cache(ids),
            prompt.fork(),
            attached.load_cache(tmp_path / "file"),
        ):
            known = cache.get_seq_length()
            assert known >= 5 * PAGE
            got = model(ids[:, known:], past_key_values=cache).logits[0, -1]
            assert (got - wanted).abs().max() < 0.15
            first = got.argmax()[None]
            graph = DecodeGraph(model, cache, first, 20)
            said = torch.cat([ids, first[None], graph.run(20)], 1)
            logits = model(said).logits[0, ids.shape[1] - 1 : -1]
            chosen = logits.gather(-1, said[0, ids.shape[1] :, None])[:, 0]
            assert (logits.amax(-1) - chosen).max() < 0.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_refuses_pages_that_another_cache_moved():
    model = tiny("llama", torch.float16).cuda()
    system = SYSTEM.cuda()
    with quantpage.attach(model, "int8", page_size=PAGE) as attached, torch.inference_mode():
        cache = attached.new_cache()
        first = model(system, past_key_values=cache).logits[:, -1].argmax(-1)
        other = cache.fork()
        graph = DecodeGraph(model, cache, first, 8)
        graph.run(2)
        model(tokens(1, 900).cuda(), past_key_values=other)
        with pytest.raises(CacheError, match="its pages moved"):
            graph.run(2)
