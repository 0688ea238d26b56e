"""Mixtral in Hugging Face folders: Mistral with experts for an MLP, in every layer.

Its GGUF files are of architecture `llama`.
"""

from __future__ import annotations

from dataclasses import replace

from nomoat.models import layers, llama, mistral
from nomoat.models.arch import Draft
from nomoat.models.fields import Fields

PEFT_MODULES = mistral.PEFT_MODULES


def _from_config(keys: Fields, model: Draft) -> None:
    layers.window_everywhere(keys, model)
    layers.experts(keys, model, "num_local_experts")


ARCHITECTURE = replace(
    mistral.ARCHITECTURE,
    experts={"router": "block_sparse_moe.gate", **llama.PEFT_EXPERTS},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    from_config=_from_config,
)
qk_permuted = ARCHITECTURE.qk_permuted
