"""`nomoat quantize`: a model file to a GGUF of another type, tensor by tensor.

Only a piece of one tensor is in memory at a time. The file appears whole or not at all.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nomoat.engine.quantize import quantize_rows
from nomoat.errors import InputError, NonFiniteError, printable
from nomoat.files.atomic import atomic_write
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType, stored_bytes
from nomoat.files.gguf import open_gguf
from nomoat.files.safetensors import open_safetensors
from nomoat.hub.store import check_disk
from nomoat.quant import entries, recipes
from nomoat.quant.source import Bytes, Floats, Source, SourceTensor, from_folder, from_gguf

Progress = Callable[[int, int], None]

LARGEST_HALF = 65_504.0


@dataclass(frozen=True)
class Written:
    """`types`: type name -> tensors. `notes` are sentences for the user."""

    path: Path
    bytes: int
    source_bytes: int
    types: dict[str, int]
    notes: tuple[str, ...]


def quantize(source: Path, to: str, output: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Written:
    """Writes `source`, a GGUF or a Hugging Face folder, as a GGUF of type `to` (a name of recipes.FILE_TYPES).

    `progress(done, total)` counts bytes of the new file. Raises InputError for an unknown type, an output that exists or is the
    source, FileFormatError and ModelError for a source that cannot be read, NonFiniteError for weights that are no numbers,
    ResourceError E_DISK before anything is written.
    """
    recipes.file_type(to)
    _check_output(source, output, overwrite)
    if source.is_dir():
        with open_safetensors(source) as folder:
            return _quantize(from_folder(source, folder), folder.nbytes, to, output, progress)
    with open_gguf(source) as file:
        if output.exists() and any(output.samefile(path) for path in file.paths):
            raise _same(output)
        return _quantize(from_gguf(file), file.nbytes, to, output, progress)


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    shown = printable(str(output))
    if output.is_dir():
        raise InputError(f"{shown}: is a folder; --output names the file to write", code="E_PATH")
    if not output.exists():
        return
    if source.exists() and output.samefile(source):
        raise _same(output)
    if not overwrite:
        raise InputError(f"{shown} exists; choose another --output, or --overwrite it", code="E_DUP")


def _same(output: Path) -> InputError:
    return InputError(f"{printable(str(output))} is the source itself; choose another --output", code="E_PATH")


def _quantize(source: Source, source_bytes: int, to: str, output: Path, progress: Progress | None) -> Written:
    number, _ = recipes.file_type(to)
    spec = source.spec
    shape = recipes.Shape(
        layers=spec.layers,
        group=spec.blocks[0].heads // spec.blocks[0].kv_heads,
        experts=max(block.experts for block in spec.blocks),
        tied="output.weight" not in source.tensors,
    )
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    types = recipes.tensor_types(to, shape, shapes, {name: tensor.stored for name, tensor in source.tensors.items()})
    head = _head(source, types, number)
    sizes = [stored_bytes(shapes[name], kind) for name, kind in types.items()]
    total = len(head) + sum(_padded(size, source.alignment) for size in sizes)
    check_disk(output.absolute().parent, total, f"the {to} file")
    with atomic_write(output) as out:
        out.write(head)
        done = 0
        for name, kind in types.items():
            begin = out.tell()
            for piece in _pieces(name, source.tensors[name], kind):
                out.write(piece.data)
                done += piece.size
                if progress:
                    progress(done, sum(sizes))
            out.write(bytes(_padded(out.tell() - begin, source.alignment) - (out.tell() - begin)))
    counts = Counter(kind.name for kind in types.values())
    return Written(output, total, source_bytes, dict(counts.most_common()), _notes(source, types, to))


def _notes(source: Source, types: dict[str, GgmlType], to: str) -> tuple[str, ...]:
    again = Counter(
        source.tensors[name].stored.name
        for name, kind in types.items()
        if source.tensors[name].stored not in recipes.FLOATS and kind not in (source.tensors[name].stored, *recipes.FLOATS)
    )
    base = recipes.FILE_TYPES[to][1]
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) > 1]
    narrow = sum(tensor.shape[-1] % BLOCK_SHAPE[base][0] != 0 for tensor in matrices)
    notes = []
    if again:
        notes.append(
            f"the source is quantized already ({', '.join(again)}): what it lost is lost, and this loses more; "
            "start from the original weights where you can"
        )
    if narrow:
        notes.append(
            f"{narrow:,} matrices have columns that are not a multiple of {BLOCK_SHAPE[base][0]}; they get the next larger type "
            "that fits, as in llama.cpp"
        )
    return tuple(notes)


def _head(source: Source, types: dict[str, GgmlType], number: int) -> bytes:
    """All bytes before the first tensor."""
    own = [entries.entry("general.file_type", number), entries.entry("general.quantization_version", 2)]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(types), len(source.entries) + len(own)), *source.entries, *own]
    offset = 0
    for name, kind in types.items():
        shape = source.tensors[name].shape
        head.append(entries.text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
        offset += _padded(stored_bytes(shape, kind), source.alignment)
    whole = b"".join(head)
    return whole.ljust(_padded(len(whole), source.alignment), b"\0")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pieces(name: str, tensor: SourceTensor, kind: GgmlType) -> Iterator[Bytes]:
    if kind is tensor.stored and tensor.raw is not None:
        yield tensor.raw()
        return
    for rows in tensor.rows():
        _check_finite(name, rows, kind)
        yield quantize_rows(rows, kind)


def _check_finite(name: str, rows: Floats, kind: GgmlType) -> None:
    most = float(np.abs(rows).max(initial=0))  # NaN stays NaN
    if not math.isfinite(most):
        raise NonFiniteError(f"tensor `{printable(name)}` holds NaN or infinity; the source is damaged, get it again")
    if kind is not GgmlType.F32 and kind is not GgmlType.BF16 and most > LARGEST_HALF:
        raise NonFiniteError(
            f"tensor `{printable(name)}` holds {most:,.0f}; {kind.name} ends at {LARGEST_HALF:,.0f}. Use BF16 or F32"
        )
