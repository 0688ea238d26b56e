"""Mistral in Hugging Face folders: Llama whose rows see a window of keys, in every layer.

Its GGUF files are of architecture `llama`.
"""

from __future__ import annotations

from dataclasses import replace

from nomoat.models import llama
from nomoat.models.layers import window_everywhere

PEFT_MODULES = llama.PEFT_MODULES

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    defaults={**llama.ARCHITECTURE.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
    biases={},
    from_config=window_everywhere,
)
qk_permuted = ARCHITECTURE.qk_permuted
