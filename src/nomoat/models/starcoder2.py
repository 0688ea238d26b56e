"""Architecture `starcoder2`: LayerNorm, an MLP without a gate (GELU), biases in norms and linears, a window in every layer."""

from __future__ import annotations

from nomoat.models import llama
from nomoat.models.arch import Architecture
from nomoat.models.layers import window_everywhere

PEFT_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}

ARCHITECTURE = Architecture(
    name="starcoder2",
    modules=PEFT_MODULES,
    norms=llama.NORMS,
    defaults={
        "num_key_value_heads": 2,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_bias": True,
    },
    biases={"use_bias": ("q", "k", "v", "o", "up", "down")},
    constants={"norm": "layer", "activation": "gelu", "gated": False},
    epsilon_key="norm_epsilon",
    from_config=window_everywhere,
)
qk_permuted = ARCHITECTURE.qk_permuted
