"""Configurations by Hugging Face model type and size: published ones, and one `tiny` of each type with every feature switched on.

Published values are those of the models' config.json files, less what says nothing about shape or arithmetic. Token ids are not
theirs: made models have a made vocabulary (`vocabulary.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.synthetic.tiny import TINY

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model type: its class in transformers, the kind of its vocabulary (vocabulary.py), what folders put before names."""

    name: str
    vocabulary: str
    prefix: str = ""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "bytes"),
    "mistral": Family("MistralForCausalLM", "pieces"),
    "mixtral": Family("MixtralForCausalLM", "pieces"),
    "qwen2": Family("Qwen2ForCausalLM", "bytes"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", "bytes"),
    "qwen3": Family("Qwen3ForCausalLM", "bytes"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "bytes"),
    "gemma2": Family("Gemma2ForCausalLM", "pieces"),
    "gemma3_text": Family("Gemma3ForCausalLM", "pieces"),
    "gemma3": Family("Gemma3ForConditionalGeneration", "pieces", prefix="language_model."),  # images too; only its text is made
    "phi3": Family("Phi3ForCausalLM", "pieces"),
    "smollm3": Family("SmolLM3ForCausalLM", "bytes"),
    "olmo2": Family("Olmo2ForCausalLM", "bytes"),
    "granite": Family("GraniteForCausalLM", "bytes"),
    "starcoder2": Family("Starcoder2ForCausalLM", "bytes"),
}


def shape(layers: int, width: int, ffn: int, heads: int, kv_heads: int, vocab: int, context: int) -> Config:
    """The keys that every model type has."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
QWEN3 = {**QWEN, "head_dim": 128, "attention_bias": False}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
GEMMA3 = {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
OLMO2 = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5e5, "attention_bias": False, "tie_word_embeddings": False}

PUBLISHED: dict[str, dict[str, Config]] = {
    "llama": {
        "llama-3-8b": {
            **shape(32, 4096, 14336, 32, 8, 128256, 8192), **LLAMA, "rope_theta": 500000.0, "tie_word_embeddings": False,
        },
        "llama-3.2-1b": {
            **shape(16, 2048, 8192, 32, 8, 128256, 131072), **LLAMA,
            "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True,
        },
        "tinyllama-1.1b": {
            **shape(22, 2048, 5632, 32, 4, 32000, 2048), **LLAMA, "rope_theta": 10000.0, "tie_word_embeddings": False,
        },
        "smollm2-135m": {
            **shape(30, 576, 1536, 9, 3, 49152, 8192), **LLAMA, "rope_theta": 100000.0, "tie_word_embeddings": True,
        },
    },
    "mistral": {"mistral-7b": {**shape(32, 4096, 14336, 32, 8, 32768, 32768), **MISTRAL}},  # v0.3
    "mixtral": {
        "mixtral-8x7b": {
            **shape(32, 4096, 14336, 32, 8, 32000, 32768), **MISTRAL, "num_local_experts": 8, "num_experts_per_tok": 2,
        },
    },
    "qwen2": {
        "qwen2.5-0.5b": {**shape(24, 896, 4864, 14, 2, 151936, 32768), **QWEN, "tie_word_embeddings": True},
        "qwen2.5-7b": {**shape(28, 3584, 18944, 28, 4, 152064, 32768), **QWEN, "tie_word_embeddings": False},
    },
    "qwen2_moe": {
        "qwen1.5-moe-a2.7b": {
            **shape(24, 2048, 5632, 16, 16, 151936, 8192), **QWEN, "tie_word_embeddings": False,
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
            "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    },
    "qwen3": {
        "qwen3-0.6b": {**shape(28, 1024, 3072, 16, 8, 151936, 40960), **QWEN3, "tie_word_embeddings": True},
        "qwen3-4b": {**shape(36, 2560, 9728, 32, 8, 151936, 40960), **QWEN3, "tie_word_embeddings": True},
    },
    "qwen3_moe": {
        "qwen3-30b-a3b": {
            **shape(48, 2048, 6144, 32, 4, 151936, 40960), **QWEN3, "tie_word_embeddings": False,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    },
    "gemma2": {
        "gemma-2-2b": {
            **shape(26, 2304, 9216, 8, 4, 256000, 8192), **GEMMA, "rope_theta": 10000.0, "sliding_window": 4096,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
    },
    "gemma3_text": {
        "gemma-3-1b": {**shape(26, 1152, 6912, 4, 1, 262144, 32768), **GEMMA3, "sliding_window": 512},
        "gemma-3-4b": {  # the language model of the multimodal one
            **shape(34, 2560, 10240, 8, 4, 262208, 131072), **GEMMA3, "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "phi3": {
        "phi-3-mini": {
            **shape(32, 3072, 8192, 32, 32, 32064, 4096), "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "original_max_position_embeddings": 4096, "sliding_window": 2047, "tie_word_embeddings": False,
        },
    },
    "smollm3": {
        "smollm3-3b": {
            **shape(36, 2048, 11008, 16, 4, 128256, 65536), **LLAMA, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
            "no_rope_layer_interval": 4, "use_sliding_window": False, "tie_word_embeddings": True,
        },
    },
    "olmo2": {
        "olmo-2-1b": {**shape(16, 2048, 8192, 16, 16, 100352, 4096), **OLMO2},
        "olmo-2-7b": {**shape(32, 4096, 11008, 32, 32, 100352, 4096), **OLMO2},
    },
    "granite": {
        "granite-3-2b": {  # 3.1
            **shape(40, 2048, 8192, 32, 8, 49155, 131072), **LLAMA, "rope_theta": 5e6, "tie_word_embeddings": True,
            "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
        },
    },
    "starcoder2": {
        "starcoder2-3b": {
            **shape(30, 3072, 12288, 24, 2, 49152, 16384), "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5,
            "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True, "tie_word_embeddings": True,
        },
    },
}  # fmt: skip


def sizes(model_type: str) -> list[str]:
    """Names of the sizes of a model type. Raises ValueError for an unknown one."""
    if model_type not in FAMILIES:
        raise ValueError(f"architecture {model_type!r}: expected one of {', '.join(FAMILIES)}")
    return [*PUBLISHED.get(model_type, {}), "tiny"]


def configuration(model_type: str, size: str, **changes: Any) -> Config:
    """A config.json. `changes` replaces keys, None drops one. Raises ValueError for an unknown type or size."""
    if size not in sizes(model_type):
        raise ValueError(f"size {size!r} of {model_type}: expected one of {', '.join(sizes(model_type))}")
    found = TINY[model_type] if size == "tiny" else PUBLISHED[model_type][size]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    whole = {"architectures": [FAMILIES[model_type].name], "model_type": model_type} | found | tokens | changes
    return {key: value for key, value in whole.items() if value is not None}


def family(config: Config) -> Family:
    """The model type of a configuration."""
    return FAMILIES[config["model_type"]]
