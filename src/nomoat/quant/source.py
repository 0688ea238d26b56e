"""Where the weights come from: a GGUF or a Hugging Face folder, as what the GGUF of it will hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nomoat.engine.quantize import dequantize_rows
from nomoat.errors import ModelError, printable
from nomoat.files.ggml import ADVICE, BLOCK_SHAPE, GgmlType, stored_bytes
from nomoat.files.gguf import GgufFile
from nomoat.files.safetensors import SafetensorsFile
from nomoat.models import gguf_form, spec_from_gguf, spec_from_hf
from nomoat.models.hf import read_config
from nomoat.models.rope import interleaved_rows
from nomoat.models.spec import ModelSpec
from nomoat.models.spec import Source as Place
from nomoat.quant import entries
from nomoat.quant.vocabulary import tokenizer_keys

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

#: Values in memory at a time: 64 MB as float32.
CHUNK_VALUES = 16 << 20
#: Keys that say how a file is cut or quantized: the new one says its own.
OWN_KEYS = ("general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the GGUF. `rows` gives whole rows as float32, piece by piece; `raw` the bytes where they need no change."""

    shape: tuple[int, ...]
    stored: GgmlType
    rows: Callable[[], Iterator[Floats]]
    raw: Callable[[], Bytes] | None = None


@dataclass(frozen=True)
class Source:
    """`spec` as the GGUF is read; `entries` are its metadata without OWN_KEYS, as bytes of the file."""

    spec: ModelSpec
    alignment: int
    entries: list[bytes]
    tensors: dict[str, SourceTensor]


def from_gguf(file: GgufFile) -> Source:
    """Metadata and tokenizer stay byte for byte. Raises ModelError for a model or a type that nomoat does not know."""
    spec = spec_from_gguf(file)
    for name, info in file.tensors.items():
        if info.type not in BLOCK_SHAPE:
            what = f"tensor `{printable(name)}` is {info.type.name}, which nomoat cannot read; {ADVICE}"
            raise ModelError(f"{printable(str(file.path))}: {what}", code="E_DTYPE")
    kept = [file.entry(key) for key in file.metadata if key not in OWN_KEYS and not key.startswith("split.")]
    tensors = {
        name: SourceTensor(info.shape, info.type, lambda n=name: _decoded(file, n), lambda n=name: file.data(n))  # type: ignore[misc]
        for name, info in file.tensors.items()
    }
    return Source(spec, file.get_int("general.alignment", default=32), kept, tensors)


def _decoded(file: GgufFile, name: str) -> Iterator[Floats]:
    info = file.tensors[name]
    columns = info.shape[-1] if info.shape else 1
    packed = file.data(name).reshape(-1, stored_bytes((columns,), info.type))
    step = max(1, CHUNK_VALUES // columns)
    for begin in range(0, len(packed), step):
        yield dequantize_rows(packed[begin : begin + step], info.type, columns)


def from_folder(path: Path, file: SafetensorsFile) -> Source:
    """As llama.cpp's converter would write it. Raises ModelError where GGUF cannot say what the folder does."""
    config = read_config(path)
    own = spec_from_hf(config, file.tensors, name=path.name)
    spec, keys, divisors = gguf_form(config, name=path.name)
    keys = {"general.architecture": spec.architecture, "general.type": "model", "general.name": path.name, **keys}
    keys |= tokenizer_keys(path, spec.vocab)
    tensors = {
        name: SourceTensor(values.shape, GgmlType.F32, lambda v=values: iter([v.reshape(1, -1)]))  # type: ignore[misc]
        for name, values in divisors.items()
    }
    for name, parts in _parts(spec).items():
        shapes = [spec.tensor_shape(engine) for engine, _ in parts]
        shape = shapes[0] if len(parts) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
        tensors[name] = SourceTensor(shape, GgmlType.F32, lambda p=parts: _gathered(file, own, spec, p))  # type: ignore[misc]
    return Source(spec, 32, [entries.entry(key, value) for key, value in keys.items()], tensors)


def _parts(spec: ModelSpec) -> dict[str, list[tuple[str, Place]]]:
    """GGUF tensor -> the weights in it, one below the other."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for engine, place in spec.tensors.items():
        found.setdefault(place.names[0], []).append((engine, place))
    return {name: sorted(parts, key=lambda part: part[1].first) for name, parts in found.items()}


def _gathered(file: SafetensorsFile, own: ModelSpec, spec: ModelSpec, parts: list[tuple[str, Place]]) -> Iterator[Floats]:
    """Weights of the folder in whole rows, q and k in the order that the GGUF's rotation wants."""
    interleaved = any(rope.interleaved for rope in spec.ropes)
    for engine, place in parts:
        turned = interleaved and engine.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias")
        kept = own.tensors[engine]
        add = np.float32(kept.add - place.add)
        for name in kept.names:
            shape = file.tensors[name].shape
            if len(shape) == 1:
                vector = file.array(name)[kept.first : None if kept.rows is None else kept.first + kept.rows] + add
                yield vector[_order(spec, len(vector))][None] if turned else vector[None]
                continue
            first, count = (0, math.prod(shape[:-1])) if kept.rows is None else (kept.first, kept.rows)
            step = max(1, CHUNK_VALUES // shape[-1] // spec.head_dim) * spec.head_dim  # whole heads
            for begin in range(first, first + count, step):
                piece = file.rows(name, begin, min(step, first + count - begin))
                yield (piece[_order(spec, len(piece))] if turned else piece) + add


def _order(spec: ModelSpec, rows: int) -> npt.NDArray[np.intp]:
    return interleaved_rows(rows // spec.head_dim, spec.head_dim)
