"""Configurations of models that mix attention with state spaces, linear attention or convolutions, or whose
layers share keys and values.

`tests.tiny_models.tiny_model` makes them. Those that this version of transformers does not have are left out.
"""

from typing import Any

import transformers

_LINEAR = ["linear_attention", "full_attention", "full_attention"]
_HEADS = {f"linear_num_{side}_heads": 2 for side in ("key", "value")}
_DELTA = {"layer_types": _LINEAR, "head_dim": 32, **_HEADS}
_DELTA |= {f"linear_{side}_head_dim": 16 for side in ("key", "value")}
_CONV = {"layer_types": ["conv", "full_attention", "full_attention"]}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 32}
_LOCAL = {"num_local_experts": 2, "num_experts_per_tok": 1}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
_SHARING = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256,
}
_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
_LATENT |= {"num_key_value_heads": 4, "layer_types": _LINEAR}

WORKING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA, **_SHARED}),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_SHARED}),
    "olmo_hybrid": ("OlmoHybridConfig", {k: v for k, v in _DELTA.items() if k != "head_dim"}),
    "lara_mini": (
        "LaraMiniConfig",
        {
            **_DELTA,
            **_EXPERTS,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "bamba": ("BambaConfig", {"attn_layer_indices": [1], **_MAMBA}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention", "attention"],
            "shared_intermediate_size": 32,
            **_LOCAL,
            **_MAMBA,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "head_dim": 32,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"head_dim": 32, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "lfm2": ("Lfm2Config", _CONV),
    "lfm2_moe": ("Lfm2MoeConfig", {**_CONV, **_EXPERTS, "num_dense_layers": 1}),
    "lfm3": ("Lfm3Config", {**_CONV, "head_dim": 32}),
    "zaya": ("ZayaConfig", {**_EXPERTS, "head_dim": 32, "router_hidden_size": 32}),
}
SHARING: dict[str, tuple[str, dict[str, Any]]] = {  # the last two layers attend to keys of others
    "gemma3n": (
        "Gemma3nTextConfig",
        {**_SHARING, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4": ("Gemma4TextConfig", {**_SHARING, "global_head_dim": 64, "query_pre_attn_scalar": 32}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "MiniMaxConfig",
        {"layer_types": ["linear_attention", "full_attention", "full_attention"], **_LOCAL},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {**_LATENT, **_LOCAL, "moe_intermediate_size": 32, "linear_head_dim": 16, "linear_num_heads": 2},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "use_mem_rope": True,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
}
HYBRID: dict[str, tuple[type, dict[str, Any]]] = {
    name: (getattr(transformers, kind), options)
    for name, (kind, options) in {**WORKING, **SHARING, **REFUSED}.items()
    if hasattr(transformers, kind)
}
