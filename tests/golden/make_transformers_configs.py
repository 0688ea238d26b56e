"""Writes transformers_configs.json: config.json, tensors and rotary frequencies of tiny models, as transformers makes them.

    PYTHONPATH=src:tests .parity/bin/python -m golden.make_transformers_configs

Its Config classes fill in what a config.json may leave out. `tests/parity` runs `make` again and compares.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("transformers_configs.json")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.2],
    "long_factor": [1.1, 2.5, 4.0],
}
WHOLE_HEADS = {"partial_rotary_factor": 1.0, "short_factor": [1.0, 1.0, 1.05, 1.2], "long_factor": [1.0, 1.1, 2.5, 4.0]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

#: name -> (model class, what its config is given beside SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama_dynamic": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama_llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_longrope": (
        "LlamaForCausalLM",
        {"rope_parameters": LONGROPE | WHOLE_HEADS | {"original_max_position_embeddings": 64, "factor": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2_yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MIXTURE | {"shared_expert_intermediate_size": 24}),
    "qwen2_moe_dense_layers": (
        "Qwen2MoeForCausalLM",
        MIXTURE
        | {"num_hidden_layers": 4, "mlp_only_layers": [0], "qkv_bias": False, "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3, "shared_expert_intermediate_size": 24},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3_yarn": ("Qwen3ForCausalLM", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, "head_dim": 16}),
    "qwen3_untruncated": (
        "Qwen3ForCausalLM",
        {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.5, "beta_fast": 4.0}, "head_dim": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MIXTURE | {"norm_topk_prob": True}),
    "qwen3_moe_dense_layers": (
        "Qwen3MoeForCausalLM",
        MIXTURE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True},
    ),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 3}),
    "gemma2_uncapped": (
        "Gemma2ForCausalLM",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": SIZES | {"head_dim": 16}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 16, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "phi3_longrope": ("Phi3ForCausalLM", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
    "smollm3_own_layers": (
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 16, "attention_bias": True},
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite": (
        "GraniteForCausalLM",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "residual_multiplier": 0.22, "logits_scaling": 8.0}
        | {"tie_word_embeddings": True},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 16}),
    "starcoder2_no_bias": ("Starcoder2ForCausalLM", {"use_bias": False, "tie_word_embeddings": False}),
}


def make(name: str) -> dict[str, Any]:
    """`config`, `tensors` (name -> shape) and `ropes` (name -> inv_freq, magnitude) of a case."""
    import torch
    import transformers

    kind, settings = CASES[name]
    model_class = getattr(transformers, kind)
    sizes = {} if "text_config" in settings else SIZES
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **settings}))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        del config["transformers_version"]
        raw = (Path(folder) / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return {
        "config": config,
        "tensors": {tensor: slot["shape"] for tensor, slot in sorted(header.items())},
        "ropes": _ropes(next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))),
    }


def _ropes(module: Any) -> dict[str, dict[str, Any]]:
    """By layer type where there are several; for longrope also beyond the original context, as `long`."""
    import torch

    found = {}
    for name, values in list(module.named_buffers()):
        if name.endswith("inv_freq") and "original" not in name:
            section = name.removesuffix("inv_freq").rstrip("_")
            scaling = getattr(module, f"{section}_attention_scaling" if section else "attention_scaling")
            found[section or "all"] = {"inv_freq": _rounded(values), "magnitude": scaling}
    if module.rope_type == "longrope":
        beyond = module.config.rope_parameters["original_max_position_embeddings"]
        module(torch.zeros(1), torch.tensor([[beyond]]))
        found["long"] = {"inv_freq": _rounded(module.inv_freq), "magnitude": module.attention_scaling}
    return found


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.8g}") for value in values.tolist()]


def text(cases: dict[str, dict[str, Any]]) -> str:
    """JSON with one line for each case."""
    lines = (f"{json.dumps(name)}: {json.dumps(case, sort_keys=True, separators=(',', ':'))}" for name, case in cases.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text({name: make(name) for name in CASES}), encoding="utf-8")
