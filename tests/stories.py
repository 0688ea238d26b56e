"""stories260K (llama2.c checkpoint, version 0) as a GGUF: a real trained model of 260,000 weights with a published greedy text.

The checkpoint is seven int32 (width, ffn, layers, heads, kv_heads, vocab, context), then float32 weights, kind by kind and layer
by layer; its rotation is interleaved, as in GGUF. The vocabulary is an int32, then per token float32 score, int32 length, bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

LLAMA2C_EPS = 1e-5
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # GGUF token types


def stories_gguf(source: Path, path: Path) -> Path:
    """Writes `stories260K.bin` and `tok512.bin` of the folder `source` as one F32 GGUF and returns its path."""
    raw = (source / "stories260K.bin").read_bytes()
    width, ffn, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    values = np.frombuffer(raw, "<f4", offset=28)
    kv = width // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "rope.dimension_count": width // heads,
        "vocab_size": vocab,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", LLAMA2C_EPS)
    _add_vocabulary(writer, (source / "tok512.bin").read_bytes(), vocab)

    begin = 0
    for name, shape in (
        ("token_embd", (vocab, width)),
        ("blk.{}.attn_norm", (layers, width)),
        ("blk.{}.attn_q", (layers, width, width)),
        ("blk.{}.attn_k", (layers, kv, width)),
        ("blk.{}.attn_v", (layers, kv, width)),
        ("blk.{}.attn_output", (layers, width, width)),
        ("blk.{}.ffn_norm", (layers, width)),
        ("blk.{}.ffn_gate", (layers, ffn, width)),
        ("blk.{}.ffn_down", (layers, width, ffn)),
        ("blk.{}.ffn_up", (layers, ffn, width)),
        ("output_norm", (width,)),
    ):
        size = int(np.prod(shape))
        tensor = values[begin : begin + size].reshape(shape)
        begin += size
        for i in range(layers if "{}" in name else 1):
            writer.add_tensor(name.format(i) + ".weight", np.ascontiguousarray(tensor[i] if "{}" in name else tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, raw: bytes, vocab: int) -> None:
    tokens, scores, types = [], [], []
    at = 4
    for i in range(vocab):
        score, length = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + length].decode()
        at += 8 + length
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 3 + 256 else NORMAL
        tokens.append(text.strip() if i < 3 else text.replace(" ", "\u2581"))
        scores.append(score)
        types.append(kind)
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_string("tokenizer.ggml.pre", "default")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", scores)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)


def golden_text(source: Path) -> str:
    """The published greedy continuation of the empty prompt, out of stories260K.md."""
    page = (source / "stories260K.md").read_text()
    return page.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
