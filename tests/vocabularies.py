"""GGUF files that hold nothing but a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf


def write_vocabulary(
    path: Path,
    model: str,
    tokens: Sequence[str],
    *,
    types: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    merges: Sequence[str] | None = None,
    **keys: Any,
) -> Path:
    """`model` as in tokenizer.ggml.model; `types` default to 1, normal; `keys` are other keys of tokenizer.ggml."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types or [1] * len(tokens)))
    if scores is not None:
        writer.add_token_scores(list(scores))
    if merges is not None:
        writer.add_token_merges(list(merges))
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
