"""Architecture `qwen2moe`: the mixtures of Qwen 1.5 and 2. Biases on q, k and v, and a shared expert beside the others."""

from __future__ import annotations

from dataclasses import replace

from nomoat.models import layers, llama, qwen3moe
from nomoat.models.arch import Draft
from nomoat.models.fields import MAX_FFN, MAX_LAYERS, Fields
from nomoat.models.spec import ModelSpec

PEFT_EXPERTS = qwen3moe.PEFT_EXPERTS
PEFT_MODULES = {
    **llama.PEFT_MODULES,
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
}


def _from_config(keys: Fields, model: Draft) -> None:
    if keys.flag("qkv_bias"):
        model.biases |= {"q", "k", "v"}
    if keys.flag("use_sliding_window", default=False):
        last = keys.integer("max_window_layers", 0, MAX_LAYERS)
        layers.windows_by_type(keys, model, lambda layer: layer < last and layer % 2 == 0)
    qwen3moe.experts(keys, model)
    _shared(model, [keys.integer("shared_expert_intermediate_size", 1, MAX_FFN)] * model.layers)


def _from_metadata(keys: Fields, model: Draft) -> None:
    """What llama.cpp takes where older files lack a key: a shared expert as wide as a dense MLP, others that share its width."""
    if not any(model.experts):
        return
    whole = keys.integers("feed_forward_length", 1, MAX_FFN, model.layers)
    if not keys.has("expert_feed_forward_length"):
        used = model.fields["experts_used"]
        model.ffn = [max(1, ffn // used) if experts else ffn for experts, ffn in zip(model.experts, whole, strict=True)]
    stated = keys.integer("expert_shared_feed_forward_length", 0, MAX_FFN, default=0)  # 0 counts as absent
    _shared(model, [stated or ffn for ffn in whole])
    model.fields["expert_norm"] = keys.flag("expert_weights_norm", default=False)


def _shared(model: Draft, widths: list[int]) -> None:
    model.shared = [width if experts else 0 for experts, width in zip(model.experts, widths, strict=True)]


def _to_metadata(spec: ModelSpec) -> dict[str, object]:
    return {"expert_shared_feed_forward_length": max(block.shared for block in spec.blocks)}


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    name="qwen2moe",
    modules=PEFT_MODULES,
    experts={"router": "mlp.gate", "shared_router": "mlp.shared_expert_gate", **PEFT_EXPERTS},
    defaults={
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
    },
    biases={},
    gguf_biases=("q", "k", "v"),
    interleaved=False,
    rope_divisors=False,
    shared_expert=True,
    from_config=_from_config,
    from_metadata=_from_metadata,
    to_metadata=_to_metadata,
)
qk_permuted = ARCHITECTURE.qk_permuted
