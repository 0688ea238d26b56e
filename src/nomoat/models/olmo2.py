"""Architecture `olmo2`: OLMo 2. No norm before a block but one after it, and one over all heads of q and of k.

GGUF files of OLMo 3 are of this architecture too: three of four layers have a window, and turn positions without scaling.
"""

from __future__ import annotations

from nomoat.models import llama
from nomoat.models.arch import Architecture

PEFT_MODULES = llama.PEFT_MODULES

ARCHITECTURE = Architecture(
    name="olmo2",
    modules=PEFT_MODULES,
    norms={
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False},
    biases={"attention_bias": ("q", "k", "v", "o")},
    constants={"qk_norm": "row"},
    window_pattern=4,
    local_base=0.0,
)
qk_permuted = ARCHITECTURE.qk_permuted
