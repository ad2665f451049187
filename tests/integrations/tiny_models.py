"""Tiny random models in which attention matters.

Transformers' default initialization (0.02) leaves attention nearly uniform, so that a test on it
proves nothing; these are drawn wide.
"""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

BUILDERS = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "multi_query": lambda: tf.LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "mistral_window": lambda: tf.MistralConfig(**COMMON, sliding_window=24),
    "qwen2_bias": lambda: tf.Qwen2Config(**COMMON),
    "qwen3_norm": lambda: tf.Qwen3Config(**COMMON, head_dim=32),
    "gemma2_softcap_window": lambda: tf.Gemma2Config(
        **COMMON,
        head_dim=256,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=64,
    ),
    "gemma3_window": lambda: tf.Gemma3TextConfig(
        **COMMON, head_dim=32, sliding_window=24, layer_types=_mixed_layers()
    ),
    "gpt_oss_sinks": lambda: tf.GptOssConfig(
        **COMMON,
        head_dim=64,
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=_mixed_layers(),
    ),
    "phi3_partial_rotary": lambda: tf.Phi3Config(**COMMON, partial_rotary_factor=0.5),
    "glm_partial_rotary": lambda: tf.GlmConfig(**COMMON, head_dim=16, partial_rotary_factor=0.5),
}


def _mixed_layers() -> list[str]:
    return ["sliding_attention", "full_attention", "sliding_attention"]


def tiny(name: str, dtype: torch.dtype = torch.float64):
    """A model by name, the same weights at every call."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(BUILDERS[name](), attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Biases and sinks start at zero or unset, which would hide that they are ignored.
            if parameter.ndim == 1 and "norm" not in parameter_name:
                parameter.normal_(std=0.5)
    return model.to(dtype).eval()


def uneven(dtype=torch.float32):
    """The llama with queries that look into some channels and hardly into others."""
    model = tiny("llama", dtype)
    sizes = 2.0 ** -torch.arange(8).repeat(2).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.view(4, 16, 64).mul_(sizes[:, None] * 2)
    return model


def tokens(rows: int = 2, length: int = 100, seed: int = 1) -> torch.Tensor:
    """Random tokens that are no special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def save_tiny(path: Path) -> Path:
    """A folder with the llama, and a tokenizer whose words are w3 .. w127."""
    tiny("llama").float().save_pretrained(path)
    names = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, COMMON["vocab_size"]))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(path)
    return path
