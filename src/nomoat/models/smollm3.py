"""Architecture `smollm3`: Llama in which every fourth layer does not encode positions."""

from __future__ import annotations

from nomoat.models import layers, llama
from nomoat.models.arch import Architecture, Draft
from nomoat.models.fields import MAX_LAYERS, Fields

PEFT_MODULES = llama.PEFT_MODULES
#: What llama.cpp takes for granted; GGUF has no key for it.
INTERVAL = 4


def _turns(model: Draft, interval: int) -> list[int | None]:
    return [0 if (layer + 1) % interval else None for layer in range(model.layers)]


def _from_config(keys: Fields, model: Draft) -> None:
    model.ropes = _turns(model, keys.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=INTERVAL))
    if keys.has("no_rope_layers"):  # the name says the opposite: 1 is a layer with positions
        model.ropes = [0 if turns else None for turns in keys.integers("no_rope_layers", 0, 1, model.layers)]
    if keys.flag("use_sliding_window", default=False):
        layers.windows_by_type(keys, model, lambda layer: model.ropes[layer] is None and keys.has("sliding_window"))


def _from_metadata(keys: Fields, model: Draft) -> None:
    model.ropes = _turns(model, INTERVAL)


ARCHITECTURE = Architecture(
    name="smollm3",
    modules=PEFT_MODULES,
    norms=llama.NORMS,
    defaults={"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 2e6, "tie_word_embeddings": True},
    biases={"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")},
    interleaved=True,
    from_config=_from_config,
    from_metadata=_from_metadata,
)
qk_permuted = ARCHITECTURE.qk_permuted
