"""Architecture `gemma2`: a norm before and after each block, GELU, capped scores and logits, a window in every other layer.

Hugging Face stores norm weights less 1, GGUF as they are. The embedding is multiplied by the root of its width.
"""

from __future__ import annotations

import math

from nomoat.models import layers, llama
from nomoat.models.arch import Architecture, Draft
from nomoat.models.fields import Fields
from nomoat.models.spec import ModelSpec

PEFT_MODULES = llama.PEFT_MODULES
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
CAP_RANGE = (1e-3, 1e6)
SCALE_RANGE = (1e-6, 1e3)
#: The model of so many layers, Gemma 2 27B, scales scores by width / heads; GGUF files do not say so.
LARGEST = 46


def score_scale(keys: Fields, model: Draft) -> None:
    """`query_pre_attn_scalar` ^ -1/2, and the scale of the embedding."""
    model.fields["score_scale"] = keys.number("query_pre_attn_scalar", 1e-3, 1e6) ** -0.5
    model.fields["embed_scale"] = math.sqrt(model.width)


def gguf_score_scale(keys: Fields, model: Draft, largest: int) -> None:
    """The same for a GGUF: by a key of its own where there is one, else as llama.cpp has it."""
    usual = model.width // model.heads[0] if model.layers == largest else model.head_dim
    model.fields["score_scale"] = keys.number("attention.scale", *SCALE_RANGE, default=usual**-0.5)
    model.fields["embed_scale"] = math.sqrt(model.width)


def stored_score_scale(spec: ModelSpec, largest: int) -> dict[str, object]:
    """The key of its own, where it is needed."""
    usual = spec.width // spec.heads if spec.layers == largest else spec.head_dim
    assert spec.score_scale is not None
    return {} if math.isclose(spec.score_scale, usual**-0.5) else {"attention.scale": spec.score_scale}


def _from_config(keys: Fields, model: Draft) -> None:
    score_scale(keys, model)
    for cap, key in (("score_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping")):
        model.fields[cap] = keys.number(key, *CAP_RANGE) if keys.has(key) else 0.0
    layers.windows_by_type(keys, model, lambda layer: layer % 2 == 0)


def _from_metadata(keys: Fields, model: Draft) -> None:
    gguf_score_scale(keys, model, LARGEST)
    model.fields["score_cap"] = keys.number("attn_logit_softcapping", *CAP_RANGE, default=50.0)
    model.fields["logit_cap"] = keys.number("final_logit_softcapping", *CAP_RANGE, default=30.0)


def _to_metadata(spec: ModelSpec) -> dict[str, object]:
    caps = {"attn_logit_softcapping": spec.score_cap, "final_logit_softcapping": spec.logit_cap}
    return {key: cap for key, cap in caps.items() if cap} | stored_score_scale(spec, LARGEST)


ARCHITECTURE = Architecture(
    name="gemma2",
    modules=PEFT_MODULES,
    norms=NORMS,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    biases={"attention_bias": ("q", "k", "v", "o")},
    constants={"activation": "gelu"},
    activation_key="hidden_activation",
    norm_offset=1.0,
    window_pattern=2,
    default_window=4096,
    from_config=_from_config,
    from_metadata=_from_metadata,
    to_metadata=_to_metadata,
)
qk_permuted = ARCHITECTURE.qk_permuted
