"""Decode as a CUDA graph equals decode step by step."""

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

import quantpage
from quantpage.errors import PartlyPaged, UnsupportedModel
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.keys.calibration import calibrate
from quantpage.integrations.hf_transformers.steps.graph import DecodeGraph
from tests.integrations.tiny_models import COMMON, tiny, tokens, uneven
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_format", ["int4", "int6", "k=int4,v=int8"])
def test_a_replayed_step_turns_keys_by_the_calibrations_matrices(kv_format, tmp_path):
    """As an eager one does, and as the same model does on a CPU."""
    model = uneven(torch.float16)
    texts = [tokens(1, 400, seed) for seed in (1, 2, 3)]
    found = calibrate(model.cuda(), texts, [FORMATS["int4"]] * 3, {"text": "random"})
    assert all(layer.key_map.turn is not None for layer in found.layers.values())
    file = tmp_path / "llama.safetensors"
    found.save(file)

    def logits(model, ids, calibration=file):
        given = {"kv_format": kv_format, "page_size": 16, "calibration": calibration}
        with quantpage.attach(model, **given), torch.inference_mode():
            return model(ids, use_cache=True).logits[:, 44:].float().cpu()

    ids, steps = tokens(3, 45).cuda(), 40
    with quantpage.attach(model, kv_format, page_size=16, calibration=file), torch.inference_mode():
        out = model(ids, use_cache=True)
        first = out.logits[:, -1].argmax(-1)
        graph = DecodeGraph(model, out.past_key_values, first, steps)
        replayed = torch.cat([first[:, None], graph.run(steps)], 1)
    ids, chosen = torch.cat([ids, replayed[:, :-1]], 1), replayed.cpu()
    eager = logits(model, ids)
    lag = eager.amax(-1) - eager.gather(-1, chosen[..., None])[..., 0]
    # Of few bits: a tie that falls the other way moves a whole row of this model.
    assert (lag == 0).float().mean() > 0.9
    assert lag.quantile(0.95) < 0.15
    here, without = (logits(model.cpu(), ids.cpu(), each) for each in (file, None))
    assert (eager - here).abs().mean() < 0.5 * (without - here).abs().mean()


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
