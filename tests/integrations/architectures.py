"""Small configurations of models that differ in what their caches hold."""

from functools import partial

import transformers as tf

from tests.integrations.tiny_models import COMMON

FOUR = {**COMMON, "num_hidden_layers": 4}
MIXED = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": lambda: tf.LlamaConfig(**FOUR),
    "mistral": lambda: tf.MistralConfig(**FOUR, sliding_window=48),
    "qwen3": lambda: tf.Qwen3Config(**FOUR, head_dim=32),
    "phi3": lambda: tf.Phi3Config(**FOUR),
    "gemma2": lambda: tf.Gemma2Config(**FOUR, head_dim=32, **MIXED),
    "gemma3": lambda: tf.Gemma3TextConfig(**FOUR, head_dim=32, **MIXED),
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **{**FOUR, "num_hidden_layers": 6, "intermediate_size": [96] * 6},
        head_dim=32,
        sliding_window=48,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 6,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **FOUR, head_dim=32, **MIXED, num_local_experts=2, num_experts_per_tok=1
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **FOUR,
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=64,
    ),
    "olmo3": lambda: tf.Olmo3Config(**FOUR, sliding_window=48),
    "deepseek_v2": lambda: tf.DeepseekV2Config(**{**FOUR, **LATENT}),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**{**FOUR, **LATENT}, n_group=1, topk_group=1),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **FOUR,
        **EXPERTS,
        head_dim=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
    ),
    "lfm2": lambda: tf.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
    "bamba": lambda: tf.BambaConfig(**FOUR, **MAMBA, attn_layer_indices=[1]),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **COMMON,
        hybrid_override_pattern="M*M-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**FOUR, **MAMBA, head_dim=16, mamba_d_ssm=128),
    "gpt2": lambda: tf.GPT2Config(vocab_size=128, n_embd=64, n_head=2, n_layer=2, eos_token_id=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=128),
    "bloom": lambda: tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: tf.FalconConfig(**SMALL, multi_query=True, alibi=False),
    "falcon_of_the_second_kind": lambda: tf.FalconConfig(
        **SMALL, num_kv_heads=2, new_decoder_architecture=True, alibi=False
    ),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(
        vocab_size=128, n_embd=64, n_head=4, n_layer=2, multi_query=True, eos_token_id=2
    ),
}
NEWER = {
    # Layers with a window have twice the kv_heads that the configuration names.
    "MiMoV2FlashConfig": lambda kind: kind(
        **{**FOUR, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        head_dim=16,
        v_head_dim=32,
        **MIXED,
    ),
    "ZayaConfig": lambda kind: kind(**FOUR, **{**EXPERTS, "num_experts_per_tok": 1}, head_dim=16),
    # Layers with a window have other heads, and all of them four convolutions.
    "InklingTextConfig": lambda kind: kind(
        **FOUR,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_head_dim=16,
        sliding_window_size=48,
        d_rel=8,
        rel_extent=64,
        local_layer_ids=[0, 2],
    ),
    "KimiLinearConfig": lambda kind: kind(
        **{**FOUR, **LATENT, "q_lora_rank": None, "num_local_experts": 4},
        n_group=1,
        topk_group=1,
        linear_num_heads=4,
        linear_head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}
"""That not all releases have."""
ARCHITECTURES |= {
    name: partial(made, getattr(tf, name)) for name, made in NEWER.items() if hasattr(tf, name)
}
