"""Architecture `qwen3`: the dense Qwen 3 models. Llama with a norm over each head of q and k; last layers may have a window."""

from __future__ import annotations

from nomoat.models import llama, qwen2
from nomoat.models.arch import Architecture

PEFT_MODULES = llama.PEFT_MODULES
NORMS = {**llama.NORMS, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

ARCHITECTURE = Architecture(
    name="qwen3",
    modules=PEFT_MODULES,
    norms=NORMS,
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
    biases={"attention_bias": ("q", "k", "v", "o")},
    constants={"qk_norm": "head"},
    from_config=qwen2.windows,
)
qk_permuted = ARCHITECTURE.qk_permuted
