"""Keys of pictures beside pages (Mllama): they come and go with the tokens that brought them."""

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

import quantpage

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged"),
    # Transformers' own, of an argument of its picture encoder.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]

TILES, SIZE, PROMPT, ALL = 4, 32, 20, 30


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "cross_attention_layers": [2],
        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 48, "vision_output_dim": 64, "image_size": SIZE, "patch_size": 8,
        "max_num_tiles": TILES, "intermediate_layers_indices": [0], "initializer_range": 0.2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=127)
    found = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, each in found.named_parameters():
            if "gate" in name:
                each.fill_(0.7)
    return found


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 120, (1, ALL), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def said(model, ids, pictures=(), cache=None, seen=1):
    """Logits of ``ids`` with new pictures, by their seeds; seen: pictures up to now."""
    given = {}
    if pictures:
        drawn = [
            torch.randn(1, TILES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
            for seed in pictures
        ]
        given["pixel_values"] = torch.stack(drawn, 1)
        given["aspect_ratio_ids"] = torch.ones(1, len(pictures), dtype=torch.long)
        given["aspect_ratio_mask"] = torch.ones(1, len(pictures), TILES, dtype=torch.long)
    held = 0 if cache is None else cache.get_seq_length()
    rows = torch.ones(1, held + ids.shape[1], seen, TILES, dtype=torch.long)
    # The second picture came with the last tokens.
    rows[:, :PROMPT, 1:] = 0
    return model(
        input_ids=ids, cross_attention_mask=rows, past_key_values=cache, use_cache=True, **given
    ).logits


def test_rolling_back_keeps_pictures_that_came_before(model, ids):
    wanted = said(model, ids, [1])[:, PROMPT:]
    with quantpage.attach(model, "none", page_size=16) as attached:
        cache = attached.new_cache()
        said(model, ids[:, :PROMPT], [1], cache)
        said(model, ids[:, :5], (), cache)
        cache.crop(-5)
        got = said(model, ids[:, PROMPT:], (), cache)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_rolling_back_drops_pictures_that_came_with_what_goes(model, ids):
    both, first = (said(model, ids, each, seen=len(each))[:, PROMPT:] for each in ([1, 2], [1]))
    assert (both - first).abs().max() > 0.1
    with quantpage.attach(model, "none", page_size=16) as attached:
        cache = attached.new_cache()
        said(model, ids[:, :PROMPT], [1], cache)
        for pictures, wanted in (([2], both), ((), first), ([2], both)):
            got = said(model, ids[:, PROMPT:], pictures, cache, 1 + len(pictures))
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
            cache.crop(-(ALL - PROMPT))


@pytest.mark.parametrize("forget", [lambda cache: cache.reset(), lambda cache: cache.crop(-PROMPT)])
def test_a_cache_that_is_emptied_holds_no_pictures(model, ids, forget):
    wanted = said(model, ids, [1])
    with quantpage.attach(model, "none", page_size=16) as attached:
        cache = attached.new_cache()
        said(model, ids[:, :PROMPT], [2], cache)
        forget(cache)
        got = said(model, ids, [1], cache)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_text_alone_is_rolled_back(model, ids):
    with quantpage.attach(model, "none", page_size=16) as attached, torch.no_grad():
        cache = attached.new_cache()
        wanted = model(ids, past_key_values=cache).logits[:, PROMPT:]
        cache.crop(PROMPT - ALL)
        got = model(ids[:, PROMPT:], past_key_values=cache).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
