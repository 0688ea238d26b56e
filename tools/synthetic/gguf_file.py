"""A made model as a GGUF: float types hold the weights of `weights.py`, quantized ones random blocks. Streamed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tools.synthetic.blocks import block_bytes
from tools.synthetic.randomness import Bytes, Stream
from tools.synthetic.recipes import tensor_types
from tools.synthetic.sizes import Config, family
from tools.synthetic.vocabulary import gguf_tokenizer
from tools.synthetic.weights import FileTensor, file_tensors, stored, values

from nomoat.models import ModelSpec, gguf_form


def write(path: Path, config: Config, type: str, seed: int = 0, holes: bool = False) -> Path:
    """Writes a model and returns its path. `type` is a name of llama.cpp: F32, F16, Q8_0, Q4_K_M ...

    `holes` leaves the matrices unwritten: a file of true size that takes no room on the disk, all zeros.

    Raises ValueError for an unknown type, ModelError for a configuration that nomoat cannot run.
    """
    spec, keys, vectors = gguf_form(config)
    tensors = file_tensors(spec)
    number, types = tensor_types(type, spec, {tensor.name: tensor.shape for tensor in tensors})
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, spec.architecture)
    general = {"general.name": spec.name, "general.file_type": number}
    for key, value in (general | keys | gguf_tokenizer(spec.vocab, family(config).vocabulary)).items():
        add_key(writer, key, value)
    for name, vector in vectors.items():
        writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
    sizes = {}
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[types[tensor.name].name]
        columns, size = gguf.GGML_QUANT_SIZES[kind]
        sizes[tensor.name] = math.prod(tensor.shape) // columns * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for vector in vectors.values():
        out.write(vector.tobytes())
        writer.write_padding(out, vector.nbytes)
    for tensor in tensors:
        if holes:
            out.truncate(out.seek(sizes[tensor.name], os.SEEK_CUR))
        else:
            for piece in _data(spec, tensor, types[tensor.name].name, seed):
                out.write(piece.data)
        writer.write_padding(out, out.tell())
    writer.close()
    part.replace(path)
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key in the GGUF type that converters use for it: bool, string, float32, array, else uint32 or (negative) int32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    else:
        writer.add_array(key, value)


def _data(spec: ModelSpec, tensor: FileTensor, kind: str, seed: int) -> Iterator[Bytes]:
    if kind in ("F32", "F16", "BF16"):
        for piece in values(spec, tensor, seed):
            yield stored(piece, kind)
    else:
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        yield from block_bytes(kind, Stream(seed, tensor.name), rows, columns, columns**-0.5)
