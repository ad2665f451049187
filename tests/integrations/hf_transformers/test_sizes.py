"""What is counted from a configuration is what attach then holds, to the byte."""

import pytest
import torch
import transformers as tf

import quantpage
from quantpage.cache.sizes import held_bytes, prompt_bytes, unquantized_bytes
from quantpage.errors import FormatError, UnsupportedModel
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.modules.latent import caches_latent_rows
from quantpage.integrations.hf_transformers.sizes import cache_shape, weight_bytes
from tests.integrations.architectures import ARCHITECTURES, FOUR, SMALL
from tests.integrations.tiny_models import COMMON, tokens

pytestmark = pytest.mark.cpu


def build(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.bfloat16)
    return model.eval()


def states(cache):
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for tensor in _each(getattr(layer, name, None))
        if tensor is not None
    )


def _each(held):
    """A tensor of 5.12, or the tensors by name of later releases."""
    return held.values() if isinstance(held, dict) else [held]


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_what_is_counted_is_what_is_held(name):
    model = build(name)
    if not caches_latent_rows() and name in ("bamba", "nemotron_h"):
        with pytest.raises(UnsupportedModel, match="expected layers with keys and values"):
            cache_shape(model.config)
        return
    shape = cache_shape(model.config)
    for kv_format in ("none", "int8", "int4,first1=int8,last1=k8v4"):
        layers = shape.layers(LayerFormats.parse(kv_format), 16)
        for length in (37, 300):
            with quantpage.attach(model, kv_format, page_size=16):
                cache = model(tokens(2, length), use_cache=True).past_key_values
            assert cache.peak_bytes() <= 2 * prompt_bytes(layers, length)
            assert cache.unquantized_bytes() == 2 * unquantized_bytes(layers, length)
            cache.flush()
            assert cache.used_bytes() == 2 * held_bytes(layers, length)
            # 5.12 keeps recurrent states in the model's dtype, later releases in float32.
            if caches_latent_rows():
                assert states(cache) == 2 * shape.state_bytes
            else:
                assert states(cache) <= 2 * shape.state_bytes


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@torch.inference_mode()
def test_states_in_modules_are_no_pages():
    config = tf.RecurrentGemmaConfig(
        **{**SMALL, "num_hidden_layers": 3}, num_key_value_heads=1, attention_window_size=48
    )
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shape = cache_shape(config)
    layers = shape.layers(LayerFormats.parse("int8"), 64)
    with quantpage.attach(model, "int8") as attached:
        cache = attached.new_cache()
        model(tokens(1, 300), past_key_values=cache)
    assert len(layers) == 1 and cache.used_bytes() == held_bytes(layers, 300)
    recurrent = [each.temporal_block for each in model.model.layers[:2]]
    held = sum(x.nbytes for r in recurrent for x in (r.conv1d_state, r.rg_lru.recurrent_states))
    # Transformers calls them recurrent, and linear attention from 5.24 on.
    assert list(shape.states.values()) == [held]


def test_a_prompts_peak_is_counted_exactly():
    model = build("llama")
    layers = cache_shape(model.config).layers(LayerFormats.parse("int4"), 16)
    with quantpage.attach(model, "int4", page_size=16), torch.inference_mode():
        cache = model(tokens(2, 300)).past_key_values
    # 19 pages of codes, of the exact ones six (64 tokens may be rejected) in every layer, and 19
    # in the one that runs.
    codes, exact = layers[0].layout.bytes_per_page(), layers[0].layout.exact_bytes_per_page()
    assert prompt_bytes(layers, 300) == 4 * (19 * codes + 7 * exact) + 19 * exact
    assert cache.peak_bytes() == 2 * prompt_bytes(layers, 300)


MODELS = {
    "llama-3.1-8b": lambda: tf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "qwen3-32b": lambda: tf.Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        use_sliding_window=False,
    ),
    "gemma-3-27b": lambda: tf.Gemma3Config(
        text_config={
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
        }
    ),
    "gpt-oss-120b": lambda: tf.GptOssConfig(
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
    ),
    "deepseek-v3": lambda: tf.DeepseekV3Config(),
    "qwen3-next": lambda: tf.Qwen3NextConfig(),
    "llama-4-scout": lambda: tf.Llama4Config(
        text_config={
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_chunk_size": 8192,
        }
    ),
}
AT = 8192
"""Tokens of a request: 128 pages of 64."""


def by_hand(name, kv_format):
    """Bytes of a request of 8,192 tokens, as one would work them out on paper."""
    # A key and a value of one head: bytes of its codes and scales, or of 16-bit numbers.
    row = {
        "none": lambda width: 2 * width,
        "int8": lambda width: width + 2,
        "int4": lambda width: width // 2 + 4,
    }[kv_format]
    near = 0 if kv_format != "int4" else 1
    if name == "llama-3.1-8b":
        return 32 * 8 * 2 * (8192 * row(128) + near * 192 * 2 * 128)
    if name == "llama-4-scout":
        # The query 64 back stands in the first chunk of 8,192.
        return 48 * 8 * 2 * (8192 * row(128) + near * 192 * 2 * 128)
    if name == "qwen3-32b":
        return 64 * 8 * 2 * (8192 * row(128) + near * 192 * 2 * 128)
    if name == "gemma-3-27b":
        # 10 layers keep all; 52 what the query 64 back sees: tokens 7,105 on, 17 pages from 7,104.
        # Of three exact pages a window of 1,024 has left the first.
        full = 8192 * row(128) + near * 192 * 2 * 128
        window = 17 * 64 * row(128) + near * 128 * 2 * 128
        return 16 * 2 * (10 * full + 52 * window)
    if name == "gpt-oss-120b":
        # Tokens 8,001 on: three pages from 8,000; exact are the last two.
        full = 8192 * row(64) + near * 192 * 2 * 64
        window = 3 * 64 * row(64) + near * 128 * 2 * 64
        return 8 * 2 * 18 * (full + window)
    if name == "deepseek-v3":
        if not caches_latent_rows():
            # Keys of 128 + 64 and values of 128 in each of 128 heads.
            return 61 * 128 * (8192 * (row(192) + row(128)) + near * 192 * 2 * (192 + 128))
        # One latent of 512 and a rotary key of 64.
        return 61 * (8192 * (row(512) + row(64)) + near * 192 * 2 * (512 + 64))
    # Qwen3-Next: every fourth of 48 layers, 2 heads of 256.
    return 12 * 2 * 2 * (8192 * row(256) + near * 192 * 2 * 256)


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_known_models_by_hand(name, kv_format):
    shape = cache_shape(MODELS[name]())
    assert held_bytes(shape.layers(LayerFormats.parse(kv_format), 64), AT) == by_hand(
        name, kv_format
    )


def test_chunked_layers_keep_the_last_chunk():
    layers = cache_shape(MODELS["llama-4-scout"]()).layers(LayerFormats.parse("int8"), 64)
    # 12 layers keep 313 pages; token 19,936 stands in the chunk from 16,384 on: 57 pages.
    assert held_bytes(layers, 20_000) == (12 * 313 + 36 * 57) * 64 * 8 * 2 * 130
    # Transformers keeps a chunk's worth, but one.
    assert unquantized_bytes(layers, 20_000) == (12 * 20_000 + 36 * 8191) * 8 * 2 * 256


def test_bytes_a_token_of_known_models():
    def unquantized(name, tp=1):
        layers = cache_shape(MODELS[name](), tp).layers(LayerFormats.parse("none"), 64)
        return unquantized_bytes(layers, AT) / AT

    assert unquantized("llama-3.1-8b") == 131072
    assert unquantized("llama-3.1-8b", tp=4) == 32768
    assert unquantized("llama-3.1-8b", tp=16) == 16384, "a head cannot be divided"
    with pytest.raises(ValueError, match="tp: expected a number that divides 32 query heads"):
        unquantized("llama-3.1-8b", tp=7)
    if caches_latent_rows():
        assert unquantized("deepseek-v3") == unquantized("deepseek-v3", tp=8) == 70272
    else:
        assert unquantized("deepseek-v3") == 8 * unquantized("deepseek-v3", tp=8) == 4997120
    # Transformers keeps all but one of a window.
    assert unquantized("gemma-3-27b") * AT == 2 * 2 * 16 * 128 * (10 * AT + 52 * 1023)


def test_states_of_hybrids_are_named():
    shape = cache_shape(MODELS["qwen3-next"]())
    # 16 key heads and 32 value heads of 128: a convolution of 4 in bfloat16, states in float32.
    each = (2 * 16 * 128 + 32 * 128) * 4 * 2 + 32 * 128 * 128 * 4
    assert shape.states == {"linear_attention": 36 * each}


def test_weights_are_counted_without_reading_any():
    config = ARCHITECTURES["llama"]()
    model = tf.AutoModelForCausalLM.from_config(config)
    assert weight_bytes(config) == 2 * sum(each.numel() for each in model.parameters())
    assert weight_bytes(config, "none") == 0
    from quantpage.integrations.int8_weights import quantize_weights

    small = quantize_weights(model.to(torch.bfloat16))
    held = [*small.parameters(), *(b for n, b in small.named_buffers() if "inv_freq" not in n)]
    assert weight_bytes(config, "int8") == sum(each.nbytes for each in held)
    assert weight_bytes(MODELS["llama-3.1-8b"]()) == 2 * 8_030_261_248
    with pytest.raises(ValueError, match="weights: expected one of bf16, int8, none; got 'int2'"):
        weight_bytes(config, "int2")


PAGELESS = {
    "a picture's encoder": tf.ViTConfig(),
    "pictures beside texts": tf.CLIPConfig(),
    "a text's encoder": tf.DistilBertConfig(),
    "a sound's encoder": tf.Wav2Vec2Config(),
    "windows of pictures": tf.SwinConfig(),
    "a part of a model": tf.Qwen2VLConfig().vision_config,
    "no cache": tf.OpenAIGPTConfig(),
    "a cache of its own": tf.XLNetConfig(),
    "buckets": tf.ReformerConfig(is_decoder=True),
    "sparse blocks": tf.BigBirdConfig(is_decoder=True),
}


@pytest.mark.parametrize("kind", PAGELESS)
def test_models_without_keys_to_keep_are_not_counted(kind):
    with pytest.raises(UnsupportedModel, match=r"expected|names no attention heads"):
        cache_shape(PAGELESS[kind])


def test_a_configuration_of_ones_own_is_counted_by_its_numbers():
    class Own(tf.LlamaConfig):
        model_type = "own"

    shapes = [cache_shape(kind(**FOUR)).paged for kind in (Own, tf.LlamaConfig)]
    assert shapes[0] == shapes[1]


def test_pictures_parts_are_counted_with_the_weights():
    text = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2}
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 1},
    )
    model = tf.LlavaForConditionalGeneration(config)
    assert weight_bytes(config) == 2 * sum(each.numel() for each in model.parameters())
    assert cache_shape(config).paged == cache_shape(config.text_config).paged


def test_what_attach_refuses_is_not_counted():
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        cache_shape(tf.T5Config())
    with pytest.raises(UnsupportedModel, match="mamba: its configuration names no attention heads"):
        cache_shape(tf.MambaConfig())
    with pytest.raises(ValueError, match="tp: expected at least 1 device, got 0"):
        cache_shape(MODELS["llama-3.1-8b"](), 0)
    odd = tf.LlamaConfig(**COMMON)
    # Newest releases refuse such a width themselves, but not of other models.
    odd.__dict__["head_dim"] = 33
    with pytest.raises(FormatError, match="head_dim: expected an even number"):
        cache_shape(odd).layers(LayerFormats.parse("int4"), 64)
