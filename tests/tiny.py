"""Tiny random Llama models for tests, as GGUF files and as Hugging Face folders.

`tiny_llama(path)` and `tiny_hf(folder)` with the same shape and seed hold the same weights; in the GGUF the rows of q and k are
permuted for interleaved rotation, as llama.cpp's converter does. Weights by engine name ("embed", "blk.0.q", ...) are float32
in Hugging Face row order. Other architectures, without the freedom to change single values: tests/architectures.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import quantize
from tools.synthetic import hf_folder
from tools.synthetic.blocks import block_bytes
from tools.synthetic.gguf_file import add_key
from tools.synthetic.randomness import Stream
from tools.synthetic.vocabulary import gguf_tokenizer, write_hf_tokenizer
from tools.synthetic.weights import stored

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """Dimensions of a tiny model. `rope_scaling` is a Hugging Face `rope_scaling` object (linear or llama3)."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 96
    vocab: int = 288
    head_dim: int | None = None
    context: int = 256
    tied: bool = True
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    eps: float = 1e-5

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads


#: engine name -> (GGUF name, Hugging Face name), written out here so that the tables in nomoat.models are checked by it
LAYER_NAMES = {
    "attn_norm": ("attn_norm", "input_layernorm"),
    "q": ("attn_q", "self_attn.q_proj"),
    "k": ("attn_k", "self_attn.k_proj"),
    "v": ("attn_v", "self_attn.v_proj"),
    "o": ("attn_output", "self_attn.o_proj"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
}
TOP_NAMES = {
    "embed": ("token_embd.weight", "model.embed_tokens.weight"),
    "final_norm": ("output_norm.weight", "model.norm.weight"),
    "head": ("output.weight", "lm_head.weight"),
}


def source_name(engine: str, *, hf: bool) -> str:
    """Tensor name in a GGUF or in a Hugging Face folder."""
    if engine in TOP_NAMES:
        return TOP_NAMES[engine][hf]
    _, layer, part = engine.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part][1]}.weight" if hf else f"blk.{layer}.{LAYER_NAMES[part][0]}.weight"


def tiny_weights(shape: Shape, seed: int = 0) -> Weights:
    """Seeded random weights: matrices with variance 1 / columns, norms around 1."""
    rng = np.random.default_rng(seed)
    q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
    matrices = {
        "q": (q, shape.width),
        "k": (kv, shape.width),
        "v": (kv, shape.width),
        "o": (shape.width, q),
        "gate": (shape.ffn, shape.width),
        "up": (shape.ffn, shape.width),
        "down": (shape.width, shape.ffn),
    }

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    def norm() -> npt.NDArray[np.float32]:
        return (1 + 0.2 * rng.standard_normal(shape.width)).astype(np.float32)

    weights = {"embed": matrix(shape.vocab, shape.width)}
    for i in range(shape.layers):
        weights[f"blk.{i}.attn_norm"] = norm()
        weights[f"blk.{i}.mlp_norm"] = norm()
        for target, (rows, columns) in matrices.items():
            weights[f"blk.{i}.{target}"] = matrix(rows, columns)
    weights["final_norm"] = norm()
    if not shape.tied:
        weights["head"] = matrix(shape.vocab, shape.width)
    return weights


def interleave(matrix: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k (or of a LoRA B) from Hugging Face order to GGUF order."""
    rows, columns = matrix.shape
    pairs: npt.NDArray[np.float32] = matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
    return pairs.reshape(rows, columns)


def tiny_llama(
    path: Path,
    *,
    type: str = "F32",
    seed: int = 0,
    weights: Weights | None = None,
    metadata: dict[str, Any] | None = None,
    extra: Weights | None = None,
    tokenizer: bool = True,
    **dimensions: Any,
) -> Path:
    """Writes a GGUF with all matrices in `type` and returns its path. Widths must be multiples of the type's block.

    `metadata` replaces keys (None drops one); `extra` adds F32 tensors by their GGUF names. In types that `gguf` cannot quantize
    to, the blocks are random: only decoding matters.
    """
    shape = Shape(**dimensions)
    weights = tiny_weights(shape, seed) if weights is None else weights
    keys = _gguf_keys(shape) | (gguf_tokenizer(shape.vocab) if tokenizer else {}) | (metadata or {})
    architecture = keys.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture or "llama")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in keys.items():
        _add(writer, key, value)
    if shape.rope_scaling and shape.rope_scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(shape))
    for engine, matrix in weights.items():
        if engine.endswith((".q", ".k")):
            matrix = interleave(matrix, shape.heads if engine.endswith("q") else shape.kv_heads)
        write_tensor(writer, source_name(engine, hf=False), matrix, type if matrix.ndim == 2 else "F32", seed)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tensor(writer: gguf.GGUFWriter, name: str, matrix: npt.NDArray[np.float32], type: str, seed: int = 0) -> None:
    """Adds one tensor in a GGUF type."""
    kind = gguf.GGMLQuantizationType[type]
    if type in ("F32", "F16"):
        writer.add_tensor(name, matrix.astype(np.float32 if type == "F32" else np.float16))
    elif type.endswith("_K") or type.startswith("IQ4"):  # what `gguf` decodes but cannot quantize to
        pieces = list(block_bytes(type, Stream(seed, name), len(matrix), matrix.shape[1], matrix.shape[1] ** -0.5))
        writer.add_tensor(name, np.concatenate(pieces).reshape(len(matrix), -1), raw_dtype=kind)
    else:
        writer.add_tensor(name, quantize(matrix, kind), raw_dtype=kind)


def llama3_factors(shape: Shape) -> npt.NDArray[np.float32]:
    """Divisors of the frequencies, as `rope_freqs.weight` holds them, pair by pair from the wave length."""
    scaling = shape.rope_scaling
    assert scaling is not None
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    found = []
    for i in range(shape.dim // 2):
        wave = 2 * np.pi * shape.rope_base ** (2 * i / shape.dim)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _gguf_keys(shape: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.name": "tiny",
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.width,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.eps,
        "llama.rope.freq_base": shape.rope_base,
        "llama.rope.dimension_count": shape.dim,
        "llama.vocab_size": shape.vocab,
    }
    if shape.head_dim:
        keys |= {"llama.attention.key_length": shape.head_dim, "llama.attention.value_length": shape.head_dim}
    if shape.rope_scaling and shape.rope_scaling["rope_type"] == "linear":
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(shape.rope_scaling["factor"])}
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key in the GGUF type that converters use for it; None adds nothing."""
    if value is not None:
        add_key(writer, key, value)


def tiny_hf(
    folder: Path,
    *,
    dtype: str = "F32",
    seed: int = 0,
    weights: Weights | None = None,
    config: dict[str, Any] | None = None,
    **dimensions: Any,
) -> Path:
    """Writes a Hugging Face folder (dtype F32, F16 or BF16) and returns it. `config` replaces keys (None drops one)."""
    shape = Shape(**dimensions)
    weights = tiny_weights(shape, seed) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    keys = {key: value for key, value in (_hf_config(shape) | (config or {})).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys, indent=2))
    write_safetensors(folder / "model.safetensors", {source_name(e, hf=True): m for e, m in weights.items()}, dtype)
    write_hf_tokenizer(folder, shape.vocab)
    return folder


def write_safetensors(path: Path, arrays: dict[str, npt.NDArray[np.float32]], dtype: str = "F32") -> None:
    """Safetensors file of float32, float16 or bfloat16 (rounded to nearest even) tensors."""
    pieces = (stored(np.ascontiguousarray(array), dtype) for array in arrays.values())
    hf_folder.write_safetensors(path, {name: array.shape for name, array in arrays.items()}, pieces, dtype)


def _hf_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_base,
        "rope_scaling": shape.rope_scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
