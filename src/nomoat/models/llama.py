"""Architecture `llama`: Llama 1, 2 and 3.x, TinyLlama, SmolLM2, Yi, CodeLlama; its GGUF files also hold Mistral and Mixtral.

One layer: RMSNorm, attention with grouped key/value heads and rotary embedding, RMSNorm, SwiGLU.
"""

from __future__ import annotations

from nomoat.models.arch import Architecture

PEFT_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: Experts of Mixtral, whose GGUF files are of this architecture.
PEFT_EXPERTS = {
    "gate": "block_sparse_moe.experts.{e}.w1",
    "up": "block_sparse_moe.experts.{e}.w3",
    "down": "block_sparse_moe.experts.{e}.w2",
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

ARCHITECTURE = Architecture(
    name="llama",
    modules=PEFT_MODULES,
    norms=NORMS,
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False},
    biases={"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")},
    interleaved=True,
    gguf_experts=True,
    rope_divisors=True,
)
qk_permuted = ARCHITECTURE.qk_permuted
