"""Any class of Transformers, tiny and random: its configuration shrunk by the names of its numbers.

A configuration's defaults are a real model's. Widths, heads, experts and the like become what SMALL
says; of the layers, one of each kind stays, and every list of the layers is cut alike.
"""

import torch
import transformers
from transformers import CONFIG_MAPPING

SMALL = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "d_embed": 64,
    "embedding_size": 64, "word_embed_proj_dim": 64, "hidden_dim": 64, "vision_hidden_size": 64,
    "projection_dim": 64, "mm_hidden_size": 64, "vision_embed_dim": 64, "out_hidden_size": 64,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "n_head_kv": 2,
    "num_kv_heads": 2, "head_dim": 16, "attention_head_dim": 16, "rotary_dim": 8, "d_kv": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "v_head_dim": 16,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "n_inner": 96, "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96,
    "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "vocab_size": 128, "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512,
    "max_sequence_length": 512, "max_seq_len": 512, "seq_length": 512,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1,
    "topk_group": 1, "num_shared_experts": 1, "n_shared_experts": 1, "zero_expert_num": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "sliding_window": 24, "attention_chunk_size": 24, "attention_window_size": 24,
    "first_k_dense_replace": 1, "num_kv_shared_layers": 0,
    "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16,
    "mamba_dt_rank": 8, "mamba_expand": 2, "num_heads_linear": 4, "lru_width": 64,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "vision_feature_layer": -1, "image_size": 32, "patch_size": 8,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "laurel_rank": 8,
    "depth": 2, "num_mem_blocks": 1, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
    "rope_head_dim": 8, "d_inner": 128, "window_size": 24, "block_size": 8, "dropout": 0.0,
}  # fmt: skip
"""What a number of a configuration becomes, by its name."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
NEEDED = (
    "num_experts_per_tok",
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
)
"""Numbers whose default is None and that a tiny model needs all the same."""
ENCODERS = ("encoder_layers", "depth")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
PARTICULAR = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 125, "vision_end_token_id": 124},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 125, "vision_end_token_id": 124},
    "step3p5": {"sliding_window": 24},
    "glm5_next_text": {"qk_rope_head_dim": 0, "num_key_value_heads": 4},
    "paddleocr_vl_text": {"rope_parameters": _ROPE},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "mistral4": {"head_dim": 32},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "chameleon": {"vocabulary_map": {"<image>": 127}},
    "emu3": {"vocabulary_map": {"<image>": 127, "<|extra_200|>": 126}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "zamba2": {"hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
}
"""What a default does not tell."""
PARTS = {
    "granite4_vision": {"text_config": ("granite4_vision_text", {})},
    "gemma4_assistant": {
        "text_config": (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        )
    },
    "gemma4_unified_assistant": {"text_config": ("gemma4_unified_text", {})},
    "diffusion_gemma": {"vision_config": ("gemma4_vision", {})},
    "vision-encoder-decoder": {"encoder": ("vit", {}), "decoder": ("gpt2", {})},
}
"""Of which kind a part is, where the default has none, or another than its class wants; and its
numbers that are no default."""
PARTED = ("attn_config", "text_config")
"""Parts of which something particular is one number among others."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
PLACES = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


def small_arguments(config_class, given=None):
    """Arguments of a configuration class that make a tiny model."""
    parts = PARTS.get(config_class.model_type, {})
    if given is None:
        given = config_class(
            **{n: CONFIG_MAPPING[kind](**more).to_dict() for n, (kind, more) in parts.items()}
        )
    found = given
    names = set(found.to_dict()) | {name for name in vars(found) if not name.startswith("_")}
    numbers = {**_widths(found, names), **_layers(found, names), **_tokens(found, names)}
    for name in {*(getattr(config_class, "sub_configs", None) or {}), *parts}:
        inner = _get(found, name)
        if inner is not None and hasattr(inner, "to_dict"):
            numbers[name] = {**_plain(inner), **small_arguments(type(inner), inner)}
            numbers[name]["model_type"] = inner.model_type
    for name, value in PARTICULAR.get(_get(found, "model_type"), {}).items():
        held = numbers.get(name)
        numbers[name] = {**held, **value} if isinstance(held, dict) and name in PARTED else value
    return numbers


def _get(config, name):
    """An attribute; None where there is none, or one a layer (Gemma 4 says so)."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001
        return None


def _widths(found, names):
    numbers = {}
    for name in names & SMALL.keys():
        old = _get(found, name)
        missing = old is None and name in NEEDED
        if missing or (isinstance(old, (int, float)) and not isinstance(old, bool)):
            numbers[name] = SMALL[name]
    heads = next((n for n in ("num_attention_heads", "n_head", "num_heads") if n in names), None)
    for kv in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        if kv in numbers and heads and _get(found, kv) == _get(found, heads):
            numbers[kv] = 4
    for name in ("rope_parameters", "rope_scaling"):
        held = _get(found, name)
        known = getattr(type(found), "ignore_keys_at_rope_validation", ())
        if name == "rope_parameters" and "mrope_section" in known:
            # Pictures have three positions a token; the sections' default is that of wide heads.
            held = held or {"rope_type": "default", "rope_theta": 10000.0}
            held = {"mrope_section": None, **held}
        if isinstance(held, dict) and "mrope_section" in held:
            half = int(8 * held.get("partial_rotary_factor", 1.0))
            section = [half - 2 * (half // 4), half // 4, half // 4]
            numbers[name] = {**held, "mrope_section": section}
    for name in names:
        if "dropout" in name and isinstance(_get(found, name), float):
            numbers[name] = 0.0
    return numbers | {name: 0.2 for name in ("initializer_range", "init_std") if name in names}


def _layers(found, names):
    """As few layers as there are kinds, four at least, and every list of the layers cut alike."""
    numbers = {}
    layers = next((n for n in LAYERS if n in names), None)
    old = _get(found, layers) if layers else None
    kinds = _get(found, "layer_types")
    kinds = kinds or _get(found, "layers_block_type")
    if isinstance(old, int):
        keep = list(range(min(4, old)))
        if isinstance(kinds, list) and len(kinds) == old:
            firsts = sorted({kind: at for at, kind in reversed(list(enumerate(kinds)))}.values())
            rest = [at for at in range(old) if at not in firsts]
            keep = sorted((firsts + rest)[: max(4, len(firsts))])
        numbers[layers] = len(keep)
        for name in names:
            value = _get(found, name)
            if isinstance(value, (list, tuple)) and len(value) == old:
                numbers[name] = type(value)(value[i] for i in keep)
    for name in ENCODERS:
        if isinstance(_get(found, name), int):
            numbers[name] = numbers.get(layers, 2)
    return numbers


def _tokens(found, names):
    numbers = {name: at for at, name in enumerate(TOKENS) if name in names}
    for name in names:
        value = _get(found, name)
        if name.endswith(PLACES):
            numbers[name] = 127
        elif "token_id" in name and isinstance(value, int) and name not in numbers and value > 127:
            numbers[name] = 126
    return numbers


def _plain(config):
    # What is said a layer follows from layer_types, which are cut.
    skipped = (
        "per_layer_config",
        "transformers_version",
        "architectures",
        "_name_or_path",
        "id2label",
        "label2id",
    )
    return {k: v for k, v in config.to_diff_dict().items() if k not in skipped}


def build(model_type, name):
    """The class of this name, its weights drawn wide enough that attention matters."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    config = config_class(**small_arguments(config_class))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(0)
    try:
        model = model_class._from_config(config, attn_implementation="eager")
    except ValueError:
        model = model_class(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, each in model.named_parameters():
            if each.ndim >= 2 and each.is_floating_point():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.15)
            elif not parameter_name.endswith("norm.weight") and not each.any():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.1)
    return model.float().eval()
