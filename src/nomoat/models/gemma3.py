"""Architecture `gemma3`, the language part: Gemma 2 with a norm over each head of q and k, fewer full layers, no cap on scores.

Layers with a window turn positions by a base of their own, and without the scaling of the others.
"""

from __future__ import annotations

from dataclasses import replace

from nomoat.models import gemma2, layers, rope
from nomoat.models.arch import Draft
from nomoat.models.fields import MAX_LAYERS, Fields
from nomoat.models.spec import ModelSpec

PEFT_MODULES = gemma2.PEFT_MODULES
LOCAL_BASE = 10000.0
#: As in gemma2: Gemma 3 27B.
LARGEST = 62


def _from_config(keys: Fields, model: Draft) -> None:
    gemma2.score_scale(keys, model)
    if keys.has("attn_logit_softcapping"):
        raise keys.fail(
            "attn_logit_softcapping", keys.values["attn_logit_softcapping"], "null: Gemma 3 has no cap there", "E_ARCH"
        )
    model.fields["logit_cap"] = _cap(keys, "final_logit_softcapping")
    pattern = keys.integer("sliding_window_pattern", 1, MAX_LAYERS, default=6)
    layers.windows_by_type(keys, model, lambda layer: (layer + 1) % pattern != 0)
    if any(model.windows):
        local = rope.settings(keys, "sliding_attention", shared=False)
        base = keys.number("rope_local_base_freq", *rope.BASE_RANGE, default=LOCAL_BASE)
        base = local.number("rope_theta", *rope.BASE_RANGE, default=base)
        model.rotations.append(rope.scaled(local, model.head_dim, base, keys, model.context))
        model.ropes = [1 if window else 0 for window in model.windows]


def _cap(keys: Fields, key: str) -> float:
    return keys.number(key, *gemma2.CAP_RANGE) if keys.has(key) else 0.0


def _from_metadata(keys: Fields, model: Draft) -> None:
    gemma2.gguf_score_scale(keys, model, LARGEST)
    model.fields["logit_cap"] = _cap(keys, "final_logit_softcapping")


def _to_metadata(spec: ModelSpec) -> dict[str, object]:
    cap: dict[str, object] = {"final_logit_softcapping": spec.logit_cap} if spec.logit_cap else {}
    return cap | gemma2.stored_score_scale(spec, LARGEST)


ARCHITECTURE = replace(
    gemma2.ARCHITECTURE,
    name="gemma3",
    norms={**gemma2.NORMS, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    constants={"activation": "gelu", "qk_norm": "head"},
    rope_section="full_attention",
    # text alone; saved by transformers from a model of images and text, before and since version 4.52
    roots={"model.": "lm_head", "language_model.model.": "language_model.lm_head", "model.language_model.": "lm_head"},
    window_pattern=6,
    default_window=0,
    local_base=LOCAL_BASE,
    from_config=_from_config,
    from_metadata=_from_metadata,
    to_metadata=_to_metadata,
)
qk_permuted = ARCHITECTURE.qk_permuted
