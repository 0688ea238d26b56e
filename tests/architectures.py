"""The tiny models that every architecture is checked on, by `make test` against stored goldens and by `make parity` afresh.

A row for each Hugging Face model type, named after it, with what GGUF can hold too; and rows for features that only a folder can
say. A new architecture is its `tiny` configuration in tools/synthetic/tiny.py, its row here and its golden:

    PYTHONPATH=src:tests:. .parity/bin/python -m golden.make_architectures ROW
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.synthetic import gguf_file, hf_folder
from tools.synthetic.sizes import FAMILIES, configuration

from nomoat.files.gguf import LazyArray, open_gguf
from nomoat.files.safetensors import open_safetensors

GOLDENS = Path(__file__).parent / "golden" / "architectures"
#: Longer than the tiny windows (13), the original context of tiny scaled rotations (64) and one page of the key/value cache.
TOKENS = [(7 + 53 * i + i * i) % 256 for i in range(72)]
#: Of which logits are compared: the first, the first that a window cuts, one beyond the original context, the last.
POSITIONS = [0, 13, 63, 71]
SEED = 11


@dataclass(frozen=True)
class Row:
    """`changes` to the tiny configuration of a model type; `gguf`: llama.cpp runs it too. `positions` of TOKENS are compared."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    gguf: bool = True

    @property
    def config(self) -> dict[str, Any]:
        return configuration(self.model_type, "tiny", **self.changes)

    def folder(self, path: Path) -> Path:
        """The model as a Hugging Face folder in float32."""
        return hf_folder.write(path, self.config, "F32", SEED)

    def gguf_file(self, path: Path) -> Path:
        """The model as a GGUF in float32."""
        return gguf_file.write(path, self.config, "F32", SEED)


ROWS: dict[str, Row] = {model_type: Row(model_type) for model_type in FAMILIES} | {
    "gemma3": Row("gemma3", gguf=False),  # a GGUF holds its text part, which is gemma3_text
    "llama_linear": Row("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": None}),
    "mistral_window": Row("mistral", {"sliding_window": 13}, gguf=False),
    "qwen2_window": Row("qwen2", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}, gguf=False),
    "qwen2_moe_dense": Row("qwen2_moe", {"mlp_only_layers": [1], "qkv_bias": False, "norm_topk_prob": True}, gguf=False),
    "qwen3_moe_dense": Row("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}, gguf=False),
    "gemma2_scalar": Row("gemma2", {"query_pre_attn_scalar": 24}, gguf=False),
    "phi3_window": Row(
        "phi3", {"sliding_window": 13, "rope_scaling": None, "original_max_position_embeddings": 1024}, gguf=False
    ),
    "starcoder2_window": Row("starcoder2", {"sliding_window": 13}, gguf=False),
}


def golden(name: str) -> Path:
    """Where a row's golden is: `logits` [POSITIONS, V] by transformers, `folder` and `gguf` as the digests below."""
    return GOLDENS / f"{name}.npz"


def folder_digest(folder: Path) -> str:
    """sha256 over names and shapes of a folder's tensors: what transformers found complete when the golden was made."""
    with open_safetensors(folder) as file:
        lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in file.tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def gguf_digest(path: Path) -> str:
    """sha256 over a GGUF's keys (not the tokenizer's), names and shapes: what llama.cpp ran when the golden was made."""
    with open_gguf(path) as file:
        keys = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
        lines = [f"{key} {_shown(value)}" for key, value in sorted(keys.items())]
        lines += sorted(f"{name} {tuple(tensor.shape)} {tensor.type.name}" for name, tensor in file.tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shown(value: object) -> str:
    return repr(list(value.numbers())) if isinstance(value, LazyArray) else repr(value)
