"""Small random models of the causal architectures of transformers, made from the names of their settings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY, EOS, PAD = 257, 256, 0
LARGE = 3_000_000  # parameters; a larger model was not made small
SIZES = {
    32: "hidden_size d_model n_embd dim_model emb_dim embedding_size lru_width attention_hidden_size mamba_d_ssm "
    "pronunciation_embed_dim shape_embed_dim embed_dim input_embedding_size output_embedding_size word_embed_proj_dim "
    "embedding_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_experts_per_token "
    "moe_k num_blocks altup_num_inputs linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts linear_num_value_heads linear_num_heads mamba_n_heads rotary_dim laurel_rank",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner dff dim_ff n_inner "
    "intermediate_size_mlp dense_intermediate_size block_ff_dim",
    8: "head_dim kv_channels dim_head attention_head_dim sliding_window attention_chunk_size window_size "
    "attention_window_size sliding_window_size local_attention mamba_chunk_size chunk_size linear_key_head_dim "
    "linear_value_head_dim linear_head_dim hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size mamba_d_state image_size patch_size",
    1: "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_shared_experts "
    "moe_num_shared_experts mamba_n_groups num_kv_shared_layers",
    256: "max_position_embeddings n_positions max_seq_len max_target_positions n_ctx model_max_length context_length "
    "max_sequence_length pronunciation_vocab_size shape_vocab_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    EOS: "eos_token_id bos_token_id",
    PAD: "pad_token_id num_nextn_predict_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
INDEXER = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}  # many heads: fewer ties
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk2": INDEXER,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": INDEXER,
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2, "index_head_dim": 8, "index_n_heads": 2, "hc_mult": 2},
    "glm_moe_dsa": INDEXER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4": INDEXER,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4, "num_layers": 1, "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 4},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small(architecture: str, **settings: Any) -> PreTrainedModel:
    """A random model of the architecture, whose distributions are peaked."""
    config = small_config(architecture, **settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGE:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def small_config(architecture: str, **settings: Any) -> PreTrainedConfig:
    """Its configuration; ``settings`` are those of the text part."""
    default = AutoConfig.for_model(architecture)
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    reduced = {name: reductions(part) for name, part in parts.items() if part is not None}
    wanted = default.get_text_config(decoder=True)
    text = next((name for name, part in parts.items() if part is wanted), None)
    special = {**SPECIAL.get(architecture, {}), **settings}
    if text is None:
        return AutoConfig.for_model(architecture, **{**reductions(default), **special})
    reduced[text] |= special
    return AutoConfig.for_model(architecture, **{**reductions(default), **reduced})


def reductions(config: PreTrainedConfig) -> dict[str, Any]:
    """Small values of the settings that the configuration has."""
    known = {**config.to_dict(), **config.attribute_map}
    values = {name: size for name, size in SMALL.items() if name in known and _can_be_set(config, name)}
    if "kv_lora_rank" in known:
        values = {n: v for n, v in values.items() if n != "head_dim"} | {n: v for n, v in LATENT.items() if n in known}
        values["num_key_value_heads"] = 4
    if "is_decoder" in known:
        values["is_decoder"] = True
    kinds = getattr(config, "layer_types", None)
    if kinds and _can_be_set(config, "layer_types"):
        types = sorted(dict.fromkeys(kinds), key="full_attention".__eq__)
        types += types[-1:] * (2 - len(types))
        if "num_kv_shared_layers" in known:
            types, values["num_kv_shared_layers"] = types * 2, 2
        values |= {"layer_types": types, "num_hidden_layers": len(types)}
    return values


def _can_be_set(config: PreTrainedConfig, name: str) -> bool:
    of_class = getattr(type(config), config.attribute_map.get(name, name), None)
    return not isinstance(of_class, property) or of_class.fset is not None
