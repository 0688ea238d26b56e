"""From a model file to packed weights, through a cache that is memory-mapped at the next start.

    <cache>/packed/<key>.pack     magic | header length u64 | header JSON | tensors, each at a multiple of 64 bytes

The key names the source by path, size and modification time, the layout version and the type folders are quantized to; the
header carries the source's sha256 and a checksum of every tensor. Whatever does not match is packed again, never trusted.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nomoat import _native, settings
from nomoat.errors import InputError, ModelError, NomoatError
from nomoat.files.atomic import atomic_write
from nomoat.files.ggml import GgmlType
from nomoat.files.gguf import open_gguf
from nomoat.files.safetensors import open_safetensors
from nomoat.models import spec_from_gguf, spec_from_hf
from nomoat.models.hf import read_config
from nomoat.models.spec import ModelSpec

U8 = npt.NDArray[np.uint8]

#: Raised with every change of native/quant: a pack of another layout is rebuilt.
LAYOUT = 1
MAGIC = b"nomoatpk"
#: What Hugging Face folders are quantized to; "none" keeps the types of the file.
FOLDER_TYPES = ("Q8_0", "Q4_K", "none")
_HF_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}

Progress = Callable[[int, int], None]
#: (format, rows, cols, first byte, bytes) of one tensor in a pack
_Slot = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class PackedTensor:
    """One matrix in packed form, or one norm weight (`rows` = 0) as float32 padded to 32."""

    format: int
    rows: int
    cols: int
    data: U8


@dataclass(frozen=True)
class Weights:
    """Packed tensors by engine name, and the sha256 of the file or folder they came from."""

    tensors: dict[str, PackedTensor]
    digest: str


def read_spec(path: Path) -> ModelSpec:
    """Describes a GGUF file or a Hugging Face folder. Raises ModelError, FileFormatError, NotFoundError."""
    if path.is_dir():
        with open_safetensors(path) as file:
            return spec_from_hf(read_config(path), file.tensors, name=path.name)
    with open_gguf(path) as gguf:
        return spec_from_gguf(gguf)


def load_weights(path: Path, spec: ModelSpec, *, quantize: str = "Q8_0", progress: Progress | None = None) -> Weights:
    """Packed weights of a model, from the cache if it holds them. `progress(done, total)` counts source bytes.

    Raises InputError for an unknown `quantize`, ResourceError when the disk is full.
    """
    if quantize not in FOLDER_TYPES:
        raise InputError(f"quantize = {quantize!r}; expected one of {', '.join(FOLDER_TYPES)}")
    sources = _sources(path)
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sources]
    wanted = {"layout": LAYOUT, "sources": stamp, "quantize": quantize if path.is_dir() else "none"}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
    cache = settings.cache_dir() / "packed" / f"{key}.pack"
    found = _open_cache(cache, wanted)
    if found is None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as out:
            _build(path, spec, wanted, sources, out, progress)
        found = _open_cache(cache, wanted)
        if found is None:
            raise NomoatError(f"{cache}: the packed weights do not match what was just written; is the disk failing?")
    return found


def _sources(path: Path) -> list[Path]:
    if path.is_dir():
        with open_safetensors(path) as file:
            return [path / "config.json", *file.paths]
    with open_gguf(path) as gguf:
        return list(gguf.paths)


# ---- cache file --------------------------------------------------------------------------------------------------------


def _open_cache(path: Path, wanted: dict[str, Any]) -> Weights | None:
    """The cached weights, or None if there are none for `wanted` or they are damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            if head[:8] != MAGIC or len(head) < 16:
                return None
            length = int.from_bytes(head[8:], "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= min(size, 64 << 20):
                return None
            header = json.loads(file.read(length))
            if {name: header.get(name) for name in wanted} != wanted or header.get("size") != size:
                return None
            view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        tensors = {}
        for name, (format, rows, cols, begin, nbytes, checksum) in header["tensors"].items():
            data = view[begin : begin + nbytes]
            if _native.checksum(data) != checksum:
                return None
            tensors[name] = PackedTensor(format, rows, cols, data)
        return Weights(tensors, header["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    path: Path, spec: ModelSpec, wanted: dict[str, Any], sources: list[Path], out: IO[bytes], progress: Progress | None
) -> None:
    """Writes a pack: tensors are streamed one by one, so that the peak is one tensor above the result."""
    plan: dict[str, _Slot] = {}
    shapes = list(_shapes(path, spec, wanted["quantize"]))
    room = 1024 + len(json.dumps(wanted)) + sum(len(name) + 120 for name, *_ in shapes)
    begin = -(-(16 + room) // 64) * 64
    for name, format, rows, cols in shapes:
        nbytes = _native.packed_bytes(format, rows, cols) if rows else -(-cols // 32) * 128
        plan[name] = (format, rows, cols, begin, nbytes)
        begin += -(-nbytes // 64) * 64
    out.truncate(begin)
    done, total = 0, sum(slot[4] for slot in plan.values())
    table: dict[str, tuple[int, ...]] = {}
    for name, data in _packed(path, spec, wanted["quantize"], plan):
        out.seek(plan[name][3])
        out.write(data.data)
        table[name] = (*plan[name], _native.checksum(data))
        done += plan[name][4]
        if progress:
            progress(done, total)
    text = json.dumps({**wanted, "digest": _digest(sources), "size": begin, "tensors": table}).encode()
    if len(text) > room:
        raise NomoatError(f"header of {len(text)} bytes does not fit into the {room} that were reserved")
    out.seek(0)
    out.write(MAGIC + room.to_bytes(8, "little") + text.ljust(room))


def _digest(sources: list[Path]) -> str:
    """sha256 of the file; of several files: of their digests, in order."""
    digests = []
    for source in sources:
        with source.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


# ---- sources -----------------------------------------------------------------------------------------------------------


def _shapes(path: Path, spec: ModelSpec, quantize: str) -> Iterator[tuple[str, int, int, int]]:
    """(engine name, format, rows, cols) of every tensor; rows = 0 for norms."""
    if path.is_dir():
        with open_safetensors(path) as file:
            for name, source in spec.tensors.items():
                slot = file.tensors[source]
                stored = _HF_TYPES[slot.dtype]
                matrix = len(slot.shape) == 2
                yield name, _folder_type(stored, slot.shape, quantize), slot.shape[0] if matrix else 0, slot.shape[-1]
        return
    with open_gguf(path) as gguf:
        for name, source in spec.tensors.items():
            info = gguf.tensors[source]
            matrix = len(info.shape) == 2
            yield name, int(info.type), info.shape[0] if matrix else 0, info.shape[-1]


def _folder_type(stored: GgmlType, shape: tuple[int, ...], quantize: str) -> GgmlType:
    """Quantized where the columns allow it: blocks of 256 for Q4_K (else Q8_0), of 32 for Q8_0 (else as stored)."""
    if len(shape) != 2 or quantize == "none":
        return stored
    if quantize == "Q4_K" and shape[1] % 256 == 0:
        return GgmlType.Q4_K
    return GgmlType.Q8_0 if shape[1] % 32 == 0 else stored


def _packed(path: Path, spec: ModelSpec, quantize: str, plan: dict[str, _Slot]) -> Iterator[tuple[str, U8]]:
    if path.is_dir():
        from nomoat.engine.quantize import quantize_rows

        with open_safetensors(path) as file:
            for name, source in spec.tensors.items():
                format, rows, cols, _, nbytes = plan[name]
                slot = file.tensors[source]
                if not rows:
                    yield name, _padded_norm(file.array(source), cols)
                elif format == _HF_TYPES[slot.dtype]:
                    yield name, _pack(format, rows, cols, file.raw(source), nbytes)
                else:
                    yield name, _pack(format, rows, cols, quantize_rows(file.array(source), GgmlType(format)), nbytes)
        return
    with open_gguf(path) as gguf:
        for name, source in spec.tensors.items():
            format, rows, cols, _, nbytes = plan[name]
            raw = gguf.data(source)
            if rows:
                yield name, _pack(format, rows, cols, raw, nbytes)
            elif format == GgmlType.F32:
                yield name, _padded_norm(raw.view("<f4"), cols)
            else:
                raise ModelError(f"tensor `{source}` is {GgmlType(format).name}, expected F32 for a norm")


def _pack(format: int, rows: int, cols: int, raw: U8, nbytes: int) -> U8:
    out = np.empty(nbytes, np.uint8)
    _native.pack(format, rows, cols, raw, out)
    return out


def _padded_norm(weight: npt.NDArray[Any], cols: int) -> U8:
    out = np.zeros(-(-cols // 32) * 32, np.float32)
    out[:cols] = weight.reshape(-1)
    return out.view(np.uint8)
