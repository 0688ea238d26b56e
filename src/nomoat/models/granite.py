"""Architecture `granite`: Llama with a factor on the embedding, the scores, both residual branches and the logits."""

from __future__ import annotations

from nomoat.models import llama
from nomoat.models.arch import Architecture, Draft
from nomoat.models.fields import Fields
from nomoat.models.spec import ModelSpec

PEFT_MODULES = llama.PEFT_MODULES
SCALE_RANGE = (1e-6, 1e6)


def _from_config(keys: Fields, model: Draft) -> None:
    model.fields["score_scale"] = keys.number("attention_multiplier", *SCALE_RANGE)
    model.fields["embed_scale"] = keys.number("embedding_multiplier", *SCALE_RANGE)
    model.fields["residual_scale"] = keys.number("residual_multiplier", *SCALE_RANGE)
    model.fields["logit_scale"] = 1 / keys.number("logits_scaling", *SCALE_RANGE)  # a divisor, in both sources


def _from_metadata(keys: Fields, model: Draft) -> None:
    model.fields["score_scale"] = keys.number("attention.scale", *SCALE_RANGE, default=model.head_dim**-0.5)
    model.fields["embed_scale"] = keys.number("embedding_scale", *SCALE_RANGE, default=1.0)
    model.fields["residual_scale"] = keys.number("residual_scale", *SCALE_RANGE, default=1.0)
    model.fields["logit_scale"] = 1 / keys.number("logit_scale", *SCALE_RANGE)
    if not keys.flag("rope.scaling.finetuned", default=True):  # llama.cpp's switch for positions
        model.ropes = [None] * model.layers


def _to_metadata(spec: ModelSpec) -> dict[str, object]:
    return {
        "attention.scale": spec.score_scale,
        "embedding_scale": spec.embed_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": 1 / spec.logit_scale,
    }


ARCHITECTURE = Architecture(
    name="granite",
    modules=PEFT_MODULES,
    norms=llama.NORMS,
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    biases={"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")},
    interleaved=True,
    rope_divisors=True,
    from_config=_from_config,
    from_metadata=_from_metadata,
    to_metadata=_to_metadata,
)
qk_permuted = ARCHITECTURE.qk_permuted
