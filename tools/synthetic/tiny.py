"""The `tiny` size of each model type: width 64, a few layers, and every feature of the type switched on.

Windows are smaller than the tests' sequences, layers alternate, heads are wider than width / heads where the type allows it,
frequencies are scaled where the type's published models scale them. GGUF can hold all of it: what only Hugging Face folders
can say is a variant in tests/parity/table.py.
"""

from __future__ import annotations

from typing import Any

#: A window that a sequence of the tests leaves; not a multiple of anything.
WINDOW = 13

_BASE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
_SILU = {"hidden_act": "silu", "rms_norm_eps": 1e-5}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "attention_bias": False,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
_GEMMA3: dict[str, Any] = {
    **_BASE,
    **_GEMMA,
    "num_hidden_layers": 7,  # the sixth sees everything
    "num_key_value_heads": 1,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 6,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        **_BASE,
        **_SILU,
        "head_dim": 32,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
    },
    "mistral": {**_BASE, **_SILU, "head_dim": 32, "sliding_window": None, "tie_word_embeddings": False},
    "mixtral": {
        **_BASE,
        **_SILU,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen2": {**_BASE, **_SILU, "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen2_moe": {
        **_BASE,
        **_SILU,
        "use_sliding_window": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "qwen3": {
        **_BASE,
        **_SILU,
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **_BASE,
        **_SILU,
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "gemma2": {
        **_BASE,
        **_GEMMA,
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 3.0,  # small enough to bend scores of random weights
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "text_config": {**_GEMMA3, "model_type": "gemma3_text"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 285,
        "eoi_token_index": 286,
        "image_token_index": 287,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **_BASE,
        **_SILU,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,  # up to here the short factors hold; llama.cpp's contexts are not smaller
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            "long_factor": [1.0, 1.5, 2.2, 3.5, 5.0, 8.0],
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "smollm3": {
        **_BASE,
        **_SILU,
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "olmo2": {**_BASE, **_SILU, "attention_bias": False, "tie_word_embeddings": False},
    "granite": {
        **_BASE,
        **_SILU,
        "vocab_size": 283,  # as the published ones: no multiple of anything
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    "starcoder2": {
        **_BASE,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
}
