"""From a model file to packed weights, through a cache that is read or memory-mapped at the next start.

    <cache>/packed/<key>.pack     magic | header length u64 | header JSON | tensors, each at a multiple of 64 bytes

The key names the source by path, size and modification time, the layout version and the type folders are quantized to; the
header carries the source's sha256 and a checksum of every tensor. Whatever does not match is packed again, never trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nomoat import _native, settings
from nomoat.engine import packs
from nomoat.errors import InputError, ModelError, NomoatError
from nomoat.files.atomic import atomic_write
from nomoat.files.ggml import GgmlType
from nomoat.files.gguf import GgufFile, open_gguf
from nomoat.files.safetensors import SafetensorsFile, open_safetensors
from nomoat.memory import this_memory
from nomoat.models import spec_from_gguf, spec_from_hf
from nomoat.models.hf import read_config
from nomoat.models.spec import ModelSpec, Source

U8 = npt.NDArray[np.uint8]

#: Raised with every change of native/quant: a pack of another layout is rebuilt.
LAYOUT = 2
MAGIC = b"nomoatpk"
#: Rows of a packed strip: experts are packed as one matrix, so each must begin with a strip of its own.
EXPERT_ROWS = 16
#: What Hugging Face folders are quantized to; "none" keeps the types of the file.
FOLDER_TYPES = ("Q8_0", "Q4_K", "none")
#: Packs up to here are copied at the start, which takes 0.2 s; larger ones are mapped, and ready as soon.
COPIED = 1 << 30
_HF_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}

Progress = Callable[[int, int], None]
#: Asked with the bytes of all packed weights before any is read or written; raises what speaks against it.
Admit = Callable[[int], None]
#: (format, rows, cols, first byte, bytes) of one tensor in a pack
_Slot = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class PackedTensor:
    """One matrix in packed form, or one vector (`rows` = 0) as float32 padded to 32."""

    format: int
    rows: int
    cols: int
    data: U8


@dataclass(frozen=True)
class Weights:
    """Packed tensors by engine name, and the sha256 of the file or folder they came from. `in_use` keeps their pack open."""

    tensors: dict[str, PackedTensor]
    digest: str
    in_use: mmap.mmap | None = None


def read_spec(path: Path, *, context: int | None = None) -> ModelSpec:
    """Describes a GGUF file or a Hugging Face folder; `context` as in `spec_from_gguf`.

    Raises ModelError, FileFormatError, NotFoundError.
    """
    if path.is_dir():
        with open_safetensors(path) as file:
            return spec_from_hf(read_config(path), file.tensors, name=path.name, context=context)
    with open_gguf(path) as gguf:
        return spec_from_gguf(gguf, context=context)


def load_weights(
    path: Path, spec: ModelSpec, *, quantize: str = "Q8_0", progress: Progress | None = None, admit: Admit | None = None
) -> Weights:
    """Packed weights of a model, from the cache if it holds them. `progress(done, total)` counts source bytes.

    Raises InputError for an unknown `quantize`, ResourceError when the disk is full, and what `admit` raises.
    """
    if quantize not in FOLDER_TYPES:
        raise InputError(f"quantize = {quantize!r}; expected one of {', '.join(FOLDER_TYPES)}")
    sources = _sources(path)
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sources]
    wanted = {"layout": LAYOUT, "sources": stamp, "quantize": quantize if path.is_dir() else "none"}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
    cache = settings.cache_dir() / "packed" / f"{key}.pack"
    found = _open_cache(cache, wanted, admit)
    if found is None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as out:
            _build(path, spec, wanted, sources, out, progress, admit)
        found = _open_cache(cache, wanted)
        packs.trim(cache.parent, settings.packed_limit())
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


def _open_cache(path: Path, wanted: dict[str, Any], admit: Admit | None = None) -> Weights | None:
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
            if admit:
                admit(size)
            with contextlib.suppress(OSError):  # a cache that may only be read, or a file system without locks
                packs.hold(file)
            view = _contents(file, size)
            in_use = mmap.mmap(file.fileno(), min(size, mmap.PAGESIZE), access=mmap.ACCESS_READ)
        tensors, checksums = {}, []
        for name, (format, rows, cols, begin, nbytes, checksum) in header["tensors"].items():
            tensors[name] = PackedTensor(format, rows, cols, view[begin : begin + nbytes])
            checksums.append(checksum)
        intact = _native.checksums([tensor.data for tensor in tensors.values()]) == checksums
        return Weights(tensors, header["digest"], in_use) if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _contents(file: IO[bytes], size: int) -> U8:
    """The bytes of a pack, in pages of 2 MB where the system has them. With pages of 4 KB, addresses are looked up so often that
    decoding takes up to 1.3 times and training 1.1 times as long; of mapped files not every kernel has large ones."""
    huge = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if huge and size <= COPIED and 2 * size <= this_memory().available:
        return _copy(file, size, huge)
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if huge:
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(huge)
    return np.frombuffer(mapping, np.uint8)


def _copy(file: IO[bytes], size: int, huge: int) -> U8:
    """Raises OSError when the file is shorter."""
    from concurrent.futures import ThreadPoolExecutor

    page, piece = 2 << 20, 8 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(huge)
    offset = -np.frombuffer(memory, np.uint8).ctypes.data % page
    data = memoryview(memory)[offset : offset + size]

    def read(begin: int) -> None:
        end = min(begin + piece, size)
        while begin < end:
            taken = os.preadv(file.fileno(), [data[begin:end]], begin)
            if not taken:
                raise OSError(f"{file.name}: ends after {begin:,} of {size:,} bytes")
            begin += taken

    with ThreadPoolExecutor(settings.threads()) as pool:
        list(pool.map(read, range(0, size, piece)))
    return np.frombuffer(data.toreadonly(), np.uint8)


def _build(
    path: Path,
    spec: ModelSpec,
    wanted: dict[str, Any],
    sources: list[Path],
    out: IO[bytes],
    progress: Progress | None,
    admit: Admit | None,
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
    if admit:
        admit(begin)
    out.truncate(begin)
    done, total = 0, sum(slot[4] for slot in plan.values())
    table: dict[str, tuple[int, ...]] = {}
    for name, data in _packed(path, spec, plan):
        out.seek(plan[name][3])
        out.write(data.data)
        table[name] = (*plan[name], *_native.checksums([data]))
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

#: Float32 values of a Hugging Face tensor that are quantized at a time: 256 MB.
CHUNK_VALUES = 64 << 20


def _shapes(path: Path, spec: ModelSpec, quantize: str) -> Iterator[tuple[str, int, int, int]]:
    """(engine name, format, rows, cols) of every tensor; experts are one matrix below the other; rows = 0 for vectors."""
    with _open(path) as file:
        for name, source in spec.tensors.items():
            shape = spec.tensor_shape(name)
            if len(shape) == 3 and shape[1] % EXPERT_ROWS:
                raise ModelError(
                    f"{spec.name}: experts of {shape[1]:,} rows; nomoat needs a multiple of {EXPERT_ROWS}", code="E_SHAPE"
                )
            stored = _stored_type(file, source.names[0])
            # a router is small, and rounding it would send rows to other experts
            as_stored = not path.is_dir() or name.endswith(".router")
            format = stored if as_stored else _folder_type(stored, shape, quantize)
            yield name, format, math.prod(shape[:-1]) if len(shape) > 1 else 0, shape[-1]


def _open(path: Path) -> GgufFile | SafetensorsFile:
    return open_safetensors(path) if path.is_dir() else open_gguf(path)


def _stored_type(file: GgufFile | SafetensorsFile, tensor: str) -> GgmlType:
    return file.tensors[tensor].type if isinstance(file, GgufFile) else _HF_TYPES[file.tensors[tensor].dtype]


def _folder_type(stored: GgmlType, shape: tuple[int, ...], quantize: str) -> GgmlType:
    """Quantized where the columns allow it: blocks of 256 for Q4_K (else Q8_0), of 32 for Q8_0 (else as stored)."""
    if len(shape) < 2 or quantize == "none":
        return stored
    if quantize == "Q4_K" and shape[-1] % 256 == 0:
        return GgmlType.Q4_K
    return GgmlType.Q8_0 if shape[-1] % 32 == 0 else stored


def _packed(path: Path, spec: ModelSpec, plan: dict[str, _Slot]) -> Iterator[tuple[str, U8]]:
    """Every tensor in packed form."""
    with _open(path) as file:
        for name, source in spec.tensors.items():
            format, rows, cols, _, nbytes = plan[name]
            if not rows:
                yield name, _vector(file, source, cols)
                continue
            parts = [_matrix_bytes(file, tensor, GgmlType(format)) for tensor in source.names]
            raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if source.rows is not None:  # some rows of a fused matrix
                row = len(raw) // _stored_rows(file, source.names[0])
                raw = raw[source.first * row : (source.first + source.rows) * row]
            out = np.empty(nbytes, np.uint8)
            _native.pack(format, rows, cols, raw, out)
            yield name, out


def _stored_rows(file: GgufFile | SafetensorsFile, tensor: str) -> int:
    return math.prod(file.tensors[tensor].shape[:-1])


def _matrix_bytes(file: GgufFile | SafetensorsFile, tensor: str, format: GgmlType) -> U8:
    """A matrix as GGUF bytes: as it is stored, or quantized from the floats of a Hugging Face folder."""
    if isinstance(file, GgufFile):
        return file.data(tensor)
    slot = file.tensors[tensor]
    if format == _HF_TYPES[slot.dtype]:
        return file.raw(tensor)
    from nomoat.engine.quantize import quantize_rows

    rows, step = math.prod(slot.shape[:-1]), max(1, CHUNK_VALUES // slot.shape[-1])
    chunks = (file.rows(tensor, begin, min(step, rows - begin)) for begin in range(0, rows, step))
    return np.concatenate([quantize_rows(chunk, format) for chunk in chunks])


def _vector(file: GgufFile | SafetensorsFile, source: Source, cols: int) -> U8:
    """A norm's weight or a bias as float32, padded to 32."""
    name = source.names[0]
    if isinstance(file, GgufFile):
        if file.tensors[name].type != GgmlType.F32:
            raise ModelError(f"tensor `{name}` is {file.tensors[name].type.name}, expected F32 for a vector", code="E_DTYPE")
        values: npt.NDArray[np.float32] = file.data(name).view("<f4")
    else:
        values = file.array(name)
    out = np.zeros(-(-cols // 32) * 32, np.float32)
    out[:cols] = values.reshape(-1)[source.first : source.first + cols] + np.float32(source.add)
    return out.view(np.uint8)
