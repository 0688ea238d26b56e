"""A made model as a Hugging Face folder: config.json, model.safetensors, tokenizer. Streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.synthetic.randomness import Bytes
from tools.synthetic.sizes import Config, family
from tools.synthetic.vocabulary import write_hf_tokenizer
from tools.synthetic.weights import file_tensors, stored, values

from nomoat.models import spec_from_hf

DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


def write(folder: Path, config: Config, dtype: str = "F32", seed: int = 0) -> Path:
    """Writes a model and returns its folder. Raises ModelError for a configuration that nomoat cannot run."""
    spec = spec_from_hf(config, None, name=folder.name)
    tensors = file_tensors(spec)
    folder.mkdir(parents=True, exist_ok=True)
    whole = config | {"torch_dtype": DTYPES[dtype][0]}
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    pieces = (stored(piece, dtype) for tensor in tensors for piece in values(spec, tensor, seed))
    write_safetensors(
        folder / "model.safetensors", {family(config).prefix + tensor.name: tensor.shape for tensor in tensors}, pieces, dtype
    )
    write_hf_tokenizer(folder, spec.vocab, family(config).vocabulary)
    return folder


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], data: Iterable[Bytes], dtype: str = "F32") -> None:
    """Tensors of one dtype: length of the header, the header as JSON, the bytes as they come."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype][1]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in data:
            file.write(piece.data)
