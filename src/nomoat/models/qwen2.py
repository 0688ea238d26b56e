"""Architecture `qwen2`: Qwen 1.5, 2 and 2.5. Llama with biases on q, k and v; the last layers may have a window."""

from __future__ import annotations

from nomoat.models import layers, llama
from nomoat.models.arch import Architecture, Draft
from nomoat.models.fields import MAX_LAYERS, Fields

PEFT_MODULES = llama.PEFT_MODULES
DEFAULTS: dict[str, object] = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows(keys: Fields, model: Draft) -> None:
    """The window of the layers from `max_window_layers` on, if it is used at all."""
    if keys.flag("use_sliding_window", default=False):
        first = keys.integer("max_window_layers", 0, MAX_LAYERS)
        layers.windows_by_type(keys, model, lambda layer: layer >= first)


def _from_config(keys: Fields, model: Draft) -> None:
    model.biases |= {"q", "k", "v"}
    windows(keys, model)


ARCHITECTURE = Architecture(
    name="qwen2",
    modules=PEFT_MODULES,
    norms=llama.NORMS,
    defaults=DEFAULTS,
    gguf_biases=("q", "k", "v"),
    from_config=_from_config,
)
qk_permuted = ARCHITECTURE.qk_permuted
