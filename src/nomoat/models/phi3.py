"""Architecture `phi3`: Phi 3, 3.5 and 4 (the dense models). Llama with q, k, v in one matrix and gate, up in another.

Heads may turn only in part, rows may see a window, and models of 128k tokens have LongRoPE with short and long factors.
"""

from __future__ import annotations

from nomoat.models import llama
from nomoat.models.arch import Architecture
from nomoat.models.layers import window_everywhere

PEFT_MODULES = {
    "q": "self_attn.qkv_proj",
    "k": "self_attn.qkv_proj",
    "v": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_up_proj",
    "up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}

ARCHITECTURE = Architecture(
    name="phi3",
    modules=PEFT_MODULES,
    norms=llama.NORMS,
    defaults={
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    partial_rotary=True,
    gguf_names={"q": "attn_qkv", "k": "attn_qkv", "v": "attn_qkv", "gate": "ffn_up", "up": "ffn_up"},
    rope_divisors=True,
    from_config=window_everywhere,
)
qk_permuted = ARCHITECTURE.qk_permuted
