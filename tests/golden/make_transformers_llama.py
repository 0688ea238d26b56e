"""Writes transformers_llama.npz: logits and rope frequencies of tiny Llama models by transformers, in float64.

    PYTHONPATH=src:tests .parity/bin/python -m golden.make_transformers_llama

`tests/parity` runs `make` again and compares.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiny import tiny_hf

FILE = Path(__file__).with_name("transformers_llama.npz")

#: name -> dimensions of tests.tiny.Shape
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"width": 64, "heads": 4, "kv_heads": 2, "ffn": 96},
    "every_head": {"width": 48, "heads": 6, "kv_heads": 6, "ffn": 80, "tied": False},
    "one_kv_head": {"width": 64, "heads": 4, "kv_heads": 1, "ffn": 172, "layers": 3, "rope_base": 1e5},
    "own_head_dim": {"width": 48, "heads": 3, "kv_heads": 1, "head_dim": 24, "ffn": 56, "eps": 1e-6},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3_rope": {
        "rope_base": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "dynamic_rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}
TOKENS = [1, 52, 287, 11, 3, 3, 200, 77, 140, 9, 250, 18]
ROWS = [0, 5, 11]


def make() -> dict[str, npt.NDArray[np.float32]]:
    """`NAME.logits` [3, V] of ROWS and `NAME.inv_freq` [d / 2] for every model."""
    import torch
    from transformers import LlamaForCausalLM

    found = {}
    for name, dimensions in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = tiny_hf(Path(folder), **dimensions)
            model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0, ROWS]
        found[f"{name}.logits"] = logits.numpy().astype(np.float32)
        found[f"{name}.inv_freq"] = model.model.rotary_emb.inv_freq.numpy().astype(np.float32)
    return found


if __name__ == "__main__":
    np.savez(FILE, allow_pickle=False, **make())
