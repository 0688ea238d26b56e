"""Random weights of a model by engine name, and what a file holds of them under its own names.

Values belong to the engine name and are in the row order of Hugging Face, so that a folder and a GGUF of one seed are one model.
Matrices have deviation 1 / sqrt(columns), norms are around 1, biases around 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tools.synthetic.randomness import Bytes, Stream

from nomoat.models import ModelSpec
from nomoat.models.rope import interleaved_rows

Floats = npt.NDArray[np.float32]

#: Values that are made at a time.
CHUNK_VALUES = 4 << 20
VECTOR_DEVIATION = 0.2


@dataclass(frozen=True)
class Part:
    """A weight, or one expert of it."""

    engine: str
    expert: int | None = None


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file: `parts` below each other. `less` is taken off every value (Gemma's norms in Hugging Face folders)."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    less: float = 0.0


def file_tensors(spec: ModelSpec) -> list[FileTensor]:
    """The tensors that `spec.tensors` speaks of, in its order."""
    found: dict[str, FileTensor] = {}
    fused: dict[str, list[tuple[int, str]]] = {}
    for engine, source in spec.tensors.items():
        shape = spec.tensor_shape(engine)
        if source.rows is not None:
            fused.setdefault(source.names[0], []).append((source.first, engine))
        if len(source.names) > 1:
            for expert, name in enumerate(source.names):
                found[name] = FileTensor(name, shape[1:], (Part(engine, expert),), source.add)
        else:
            stored_shape = (1, *shape) if source.one_row else shape
            found[source.names[0]] = FileTensor(source.names[0], stored_shape, (Part(engine),), source.add)
    for name, pieces in fused.items():
        engines = [engine for _, engine in sorted(pieces)]
        shapes = [spec.tensor_shape(engine) for engine in engines]
        rows = sum(shape[0] for shape in shapes)
        found[name] = FileTensor(name, (rows, *shapes[0][1:]), tuple(Part(engine) for engine in engines))
    return list(found.values())


def values(spec: ModelSpec, tensor: FileTensor, seed: int) -> Iterator[Floats]:
    """A tensor in pieces of whole rows, q and k in the row order that `spec.ropes` says."""
    turned = any(rope.interleaved for rope in spec.ropes)
    for part in tensor.parts:
        for piece in _part(spec, part, seed, turned=turned):
            yield piece - np.float32(tensor.less) if tensor.less else piece


def _part(spec: ModelSpec, part: Part, seed: int, *, turned: bool) -> Iterator[Floats]:
    shape = spec.tensor_shape(part.engine)
    kind = part.engine.rpartition(".")[2]
    if len(shape) == 1:
        deviation = shape[0] ** -0.5 if kind == "shared_router" else VECTOR_DEVIATION  # the one vector that is multiplied with
        whole = Stream(seed, part.engine).normals(shape[0]) * np.float32(deviation)
        whole = whole if kind.endswith(("_bias", "_router")) else 1 + whole
        yield whole[_row_order(spec, len(whole))] if turned and kind in ("q_bias", "k_bias") else whole
        return
    columns = shape[-1]
    rows = math.prod(shape[1:-1] if part.expert is not None else shape[:-1])
    stream = Stream(seed, part.engine, skip=(part.expert or 0) * rows * columns)
    step = max(1, CHUNK_VALUES // columns // spec.head_dim) * spec.head_dim  # whole heads
    for begin in range(0, rows, step):
        number = min(step, rows - begin)
        piece = stream.normals(number * columns).reshape(number, columns) * np.float32(columns**-0.5)
        yield piece[_row_order(spec, number)] if turned and kind in ("q", "k") else piece


def _row_order(spec: ModelSpec, rows: int) -> npt.NDArray[np.intp]:
    return interleaved_rows(rows // spec.head_dim, spec.head_dim)


def stored(values: Floats, kind: str) -> Bytes:
    """The bytes of floats in F32, F16 or BF16 (rounded to nearest, ties to even)."""
    if kind == "BF16":
        bits = values.astype("<f4", copy=False).view("<u4")
        bfloats: npt.NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        return bfloats.reshape(-1).view(np.uint8)
    return values.astype("<f4" if kind == "F32" else "<f2", copy=False).reshape(-1).view(np.uint8)
