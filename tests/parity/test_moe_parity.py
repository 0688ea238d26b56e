"""Mixtures of experts of transformers, in the engine: routing, experts and what they add, from the files that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tools.synthetic.vocabulary import write_hf_tokenizer

from nomoat.engine.model import Model

TOKENS = list(range(3, 30))
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "initializer_range": 0.2,
}
QWEN: dict[str, Any] = {"moe_intermediate_size": 48, "num_experts": 8, "head_dim": 16, "decoder_sparse_step": 1}
#: name -> (transformers' class, configuration, experts of each layer)
MODELS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, [4, 4]),
    "qwen3_moe": ("Qwen3Moe", QWEN | {"norm_topk_prob": False}, [8, 8]),
    "qwen3_moe with a dense layer": ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "mlp_only_layers": [0]}, [0, 8]),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    family, config, experts = MODELS[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**COMMON | config)).eval()
    theirs.save_pretrained(tmp_path)
    write_hf_tokenizer(tmp_path, 288)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    ours = Model.load(tmp_path, quantize="none")
    assert [block.experts for block in ours.spec.blocks] == experts
    found = ours.logits(TOKENS, precision="f32")
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
