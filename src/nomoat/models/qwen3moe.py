"""Architecture `qwen3moe`: the Qwen 3 mixtures. Qwen 3 with experts for an MLP in most layers, dense ones among them."""

from __future__ import annotations

from dataclasses import replace

from nomoat.models import layers, qwen3
from nomoat.models.arch import Draft
from nomoat.models.fields import MAX_FFN, MAX_LAYERS, Fields

PEFT_MODULES = qwen3.PEFT_MODULES
PEFT_EXPERTS = {
    "gate": "mlp.experts.{e}.gate_proj",
    "up": "mlp.experts.{e}.up_proj",
    "down": "mlp.experts.{e}.down_proj",
}


def _from_config(keys: Fields, model: Draft) -> None:
    if keys.flag("use_sliding_window", default=False):
        layers.window_everywhere(keys, model)
    experts(keys, model)


def experts(keys: Fields, model: Draft) -> None:
    """Experts in every n-th layer that is not named dense."""
    step = keys.integer("decoder_sparse_step", 1, MAX_LAYERS)
    dense = set(keys.listed("mlp_only_layers", 0, model.layers - 1))
    count = "num_experts" if keys.has("num_experts") else "num_local_experts"
    layers.experts(keys, model, count, lambda layer: layer not in dense and (layer + 1) % step == 0)
    width = keys.integer("moe_intermediate_size", 1, MAX_FFN)
    model.ffn = [width if experts else ffn for experts, ffn in zip(model.experts, model.ffn, strict=True)]
    model.fields["expert_norm"] = keys.flag("norm_topk_prob")


ARCHITECTURE = replace(
    qwen3.ARCHITECTURE,
    name="qwen3moe",
    experts={"router": "mlp.gate", **PEFT_EXPERTS},
    defaults={
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "sliding_window": 4096,
    },
    gguf_experts=True,
    from_config=_from_config,
)
qk_permuted = ARCHITECTURE.qk_permuted
