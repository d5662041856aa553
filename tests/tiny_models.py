"""Configs of tiny models of real architectures, for `tests.conftest.make_model`: name -> (model type, options).

The options change what `make_model` gives to all. Windows are shorter than prompts, and layers of two kinds alternate,
so that a mask or a position that is wrong shows in the tokens.
"""

from __future__ import annotations

from typing import Any

from tests.conftest import WINDOW

Config = tuple[str, dict[str, Any]]

# With one table for input and output, some random models repeat one token for ever: text that would show no mistake.
UNTIED = {"tie_word_embeddings": False}
MIXED = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # multi-head latent attention: keys and values of different widths
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    **ROUTED,
}
SHARED_LAYERS = {  # the last two layers read the keys and values of earlier ones
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": MIXED,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    **UNTIED,
}
FALCON = {"alibi": False, "bias": False, "new_decoder_architecture": False}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}

EXACT: dict[str, Config] = {
    "Llama": ("llama", {}),
    "Llama4 text": (
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention"] * 2 + ["full_attention"] * 2,
            "no_rope_layers": [1, 1, 0, 0],
            "moe_layers": [1],
        },
    ),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Mistral, full attention": ("mistral", {"sliding_window": None}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen2": ("qwen2", {}),
    "Qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "Qwen2-MoE": ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 32, **ROUTED}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, **ROUTED}),
    "Gemma": ("gemma", {"head_dim": 16, **UNTIED}),
    "Gemma2": (
        "gemma2",
        {
            **UNTIED,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "Gemma3 text": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": MIXED, **UNTIED},
    ),
    "Gemma3n text": (
        "gemma3n_text",
        {
            **SHARED_LAYERS,
            "intermediate_size": [96] * 4,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Gemma4 text": ("gemma4_text", {**SHARED_LAYERS, "global_head_dim": 16}),
    "Phi": ("phi", {}),
    "Phi3": ("phi3", {}),
    "Phi3, sliding": ("phi3", {"sliding_window": WINDOW}),
    "Phimoe": ("phimoe", {"sliding_window": WINDOW, **EXPERTS}),
    "GPT-2": ("gpt2", {"n_positions": 256, **UNTIED}),
    "GPT-J": ("gptj", {"n_positions": 256, "rotary_dim": 8, "initializer_range": 0.4}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPTBigCode": ("gpt_bigcode", {"n_positions": 256}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.25, **UNTIED}),
    "Falcon, rotary": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, one key head": ("falcon", {**FALCON, "multi_query": True}),
    "StableLM": ("stablelm", {}),
    "Starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "OLMo": ("olmo", {}),
    "OLMo2": ("olmo2", {}),
    "OLMo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": MIXED}),
    "Granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "GraniteMoE": ("granitemoe", EXPERTS),
    "DeepSeek-V2": ("deepseek_v2", LATENT),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "GPT-OSS": ("gpt_oss", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED, **EXPERTS}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "GLM4": ("glm4", {"head_dim": 16}),
    "GLM4-MoE": (
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **ROUTED,
        },
    ),
    "Exaone4": ("exaone4", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "Nemotron": ("nemotron", {"head_dim": 16}),
    "Persimmon": ("persimmon", {"num_key_value_heads": 4}),
    "Ernie4.5": ("ernie4_5", {"head_dim": 16}),
    "BitNet": ("bitnet", {}),
    "Seed-OSS": ("seed_oss", {"head_dim": 16}),
    "HunYuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "MiniMax-M2": ("minimax_m2", {"head_dim": 16, **EXPERTS}),
    "DiffLlama": ("diffllama", {}),
    "XGLM": (
        "xglm",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4, "init_std": 0.25, **UNTIED},
    ),
    "BioGPT": ("biogpt", {"num_key_value_heads": 4, "initializer_range": 0.6, **UNTIED}),
}

# Models that a tree of guesses cannot be read by; loading them must say why.
REFUSED: dict[str, Config] = {
    "Mamba": ("mamba", {"state_size": 8, "num_attention_heads": None}),
    "Mamba2": ("mamba2", {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "Jamba": (
        "jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
    ),
    "Bamba": ("bamba", {"attn_layer_indices": [1, 3], **STATE_SPACE}),
    "Falcon-H1": ("falcon_h1", {"head_dim": 16, **STATE_SPACE, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            **ROUTED,
        },
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 64, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    ),
    "RWKV": ("rwkv", {"attention_hidden_size": 64}),
    "DeepSeek-V3.2": ("deepseek_v32", {**LATENT, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}),
    "BLOOM": ("bloom", {"n_layer": 4, "n_head": 4}),
    "MPT": ("mpt", {"max_seq_len": 256}),
    "Falcon, ALiBi": ("falcon", {**FALCON, "alibi": True, "bias": True, "multi_query": False}),
    "GPT-Neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
}
