"""Safetensors: u64 header length N, N bytes of JSON, tensor data that covers the rest of the file exactly.

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}}

Sharded models have a JSON index that says which file holds which tensor. Source: the format description in the README of
huggingface/safetensors. The header is parsed here, stricter than the reference; docs/reference/formats.md lists the differences.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from nomoat.errors import FileFormatError, NotFoundError, printable
from nomoat.files.atomic import atomic_write
from nomoat.files.source import ByteSource

MAX_HEADER = 8 << 20  # bytes; 36,000 tensors in one file take 5 MB
MAX_INDEX = 14 << 20  # bytes; 91,000 tensors take 9 MB
MAX_TENSORS = 65_536  # in one file; a LoRA adapter for every expert of a 30B mixture holds 37,000
MAX_INDEXED = 131_072  # in all shards
MAX_SHARDS = 1_024
MAX_DEPTH = 4  # brackets in brackets; a header needs 3
MAX_NAME = 512  # characters
MAX_DIMS = 8
INT64_MAX = 2**63 - 1

#: Bits of one element. Only F32, F16 and BF16 can be read as weights; the rest are known so that layouts can be checked.
DTYPE_BITS = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
)


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor lies: bytes `begin` to `end` of file `shard`, counted from the start of that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    shard: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """Open safetensors: `tensors` by name, string `metadata` of the first file. Close it, or use it as a context manager."""

    def __init__(self, path: Path, tensors: dict[str, TensorSlot], metadata: dict[str, str], shards: list[ByteSource]) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self._shards = shards

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every tensor file, in shard order."""
        return tuple(shard.path for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.size for shard in self._shards)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: read-only, zero-copy, flat. KeyError when there is no such tensor."""
        slot = self.tensors[name]
        return self._shards[slot.shard].view(slot.begin, slot.nbytes)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor widened to float32 in memory of its own. E_DTYPE unless it is F32, F16 or BF16."""
        return self.rows(name, 0, math.prod(self.tensors[name].shape[:-1])).reshape(self.tensors[name].shape)

    def rows(self, name: str, first: int, count: int) -> npt.NDArray[np.float32]:
        """As `array`, but only some rows [count, last dimension] of all dimensions before the last."""
        slot = self.tensors[name]
        columns = slot.shape[-1] if slot.shape else 1
        row = slot.nbytes // max(math.prod(slot.shape[:-1]), 1)
        raw = self.raw(name)[first * row : (first + count) * row]
        if slot.dtype == "F32":
            return raw.view("<f4").astype(np.float32).reshape(count, columns)
        if slot.dtype == "F16":
            return raw.view("<f2").astype(np.float32).reshape(count, columns)
        if slot.dtype == "BF16":  # the upper half of a float32
            wide = raw.view("<u2").astype(np.uint32)
            np.left_shift(wide, 16, out=wide)
            return wide.view(np.float32).reshape(count, columns)
        what = f"the tensor `{printable(name)}` is stored as {slot.dtype}, expected F32, F16 or BF16"
        raise FileFormatError(what, code="E_DTYPE", path=self._shards[slot.shard].path, offset=slot.begin)

    def close(self) -> None:
        """Close the files. Views that `raw` handed out stay valid."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_safetensors(path: Path | str) -> SafetensorsFile:
    """Open a `.safetensors` file, an `.index.json`, or a folder that holds a model or an adapter in that format.

    Raises NotFoundError, or FileFormatError with one of the codes in docs/reference/formats.md.
    """
    path = _find(Path(path))
    sources: list[ByteSource] = []
    try:
        if path.name.endswith(".index.json"):
            return SafetensorsFile(path, *_open_index(path, sources), sources)
        return SafetensorsFile(path, *_open_one(path, 0, sources), sources)
    except BaseException:
        for source in sources:
            source.close()
        raise


def _find(path: Path) -> Path:
    """The file to open for a folder; a file stands for itself."""
    if not os.path.isdir(path):  # unlike Path.is_dir, never raises
        return path
    for name in ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"):
        if os.path.exists(path / name):
            return path / name
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth", "pkl", "ckpt") for p in path.glob(f"*.{suffix}"))
    if pickles:
        raise FileFormatError(
            f"holds only {printable(pickles[0])}, a pickle, which can run code and is refused; "
            "convert it where you trust it: load it with torch and save it with safetensors.torch.save_file",
            code="E_PATH",
            path=path,
        )
    raise NotFoundError(
        f"{printable(str(path))}: no model.safetensors, model.safetensors.index.json or adapter_model.safetensors"
    )


def _open_one(path: Path, shard: int, sources: list[ByteSource]) -> tuple[dict[str, TensorSlot], dict[str, str]]:
    source = ByteSource(path)
    sources.append(source)
    if source.size < 8:
        source.fail("E_TRUNCATED", f"{source.size} bytes cannot hold the header length (8 bytes)", 0)
    length = int.from_bytes(source.read(0, 8), "little")
    if not 2 <= length <= MAX_HEADER:
        looks = _foreign(source.read(0, 8))
        if looks:
            source.fail("E_JSON", f"this looks like {looks}; refused. Convert it to safetensors where you trust it", 0)
        source.fail("E_LIMIT", f"the header length is {length:,}, expected 2 to {MAX_HEADER:,} bytes", 0)
    if length > source.size - 8:
        source.fail("E_TRUNCATED", f"the header takes {length:,} bytes, {source.size - 8:,} are left", 8)
    # A tensor has 2 commas between its fields, 1 in its offsets, 7 in the longest shape, and 1 behind it.
    entries = _JsonHeader(source, source.read(8, length), offset=8, entries=MAX_TENSORS, commas=11).parse()
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        source.fail("E_JSON", "__metadata__ must map strings to strings", 8)
    slots = [_slot(source, name, entry, shard) for name, entry in entries.items()]
    return _lay_out(source, slots, 8 + length), metadata


def _foreign(start: bytes) -> str | None:
    """What a file that is no safetensors file seems to be."""
    if start.startswith(b"PK\x03\x04"):
        return "a ZIP archive (a PyTorch checkpoint is one, with a pickle inside)"
    if start[:1] == b"\x80" and start[1:2] <= b"\5":
        return "a pickle, which can run code"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    return None


def _slot(source: ByteSource, name: str, entry: Any, shard: int) -> TensorSlot:
    """One tensor of the header, its offsets still relative to the data section."""

    def refuse(code: str, message: str) -> NoReturn:
        source.fail(code, f"the tensor `{printable(name[:MAX_NAME])}` {message}", 8)

    if len(name) > MAX_NAME:
        refuse("E_LIMIT", f"has a name of {len(name):,} characters, at most {MAX_NAME} are allowed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("E_JSON", "must have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _integers(shape) or not _integers(offsets):
        refuse("E_JSON", "must have a string dtype and integers in shape and data_offsets")
    if dtype not in DTYPE_BITS:
        refuse("E_DTYPE", f"has the unknown dtype {printable(dtype[:32])!r}")
    if len(shape) > MAX_DIMS:
        refuse("E_SHAPE", f"has {len(shape)} dimensions, at most {MAX_DIMS} are allowed")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        if size < 0:
            refuse("E_SHAPE", "has a negative dimension")
        bits *= size
        # Checked at every step: a zero further on must not hide an overflow.
        if size > INT64_MAX or bits > INT64_MAX:
            refuse("E_OVERFLOW", "has more bits than 63 bits can count")
    if bits % 8:
        refuse("E_SHAPE", "does not end on a byte")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        refuse("E_OFFSET", "has data_offsets that are not [begin, end]")
    if offsets[1] - offsets[0] != bits // 8:
        refuse("E_OFFSET", f"needs {bits // 8:,} bytes, its data_offsets span {offsets[1] - offsets[0]:,}")
    return TensorSlot(name, dtype, tuple(shape), offsets[0], offsets[1], shard)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _lay_out(source: ByteSource, slots: list[TensorSlot], data: int) -> dict[str, TensorSlot]:
    """Absolute offsets in file order, after proving that the tensors cover the data section without hole or overlap."""
    end = 0
    tensors: dict[str, TensorSlot] = {}
    for slot in sorted(slots, key=lambda slot: (slot.begin, slot.end)):
        if slot.begin != end:
            kind = "a hole" if slot.begin > end else "an overlap"
            source.fail("E_OFFSET", f"`{printable(slot.name)}` begins at {slot.begin:,}, expected {end:,}: {kind}", data + end)
        end = slot.end
        tensors[slot.name] = replace(slot, begin=data + slot.begin, end=data + slot.end)
    left = source.size - data
    if end > left:
        source.fail("E_TRUNCATED", f"the tensors take {end:,} bytes, {left:,} are left; get the file again", source.size)
    if end < left:
        source.fail("E_OFFSET", f"{left - end:,} bytes follow the last tensor", data + end)
    return tensors


_STEPS = np.zeros(256, np.int8)  # what a character does to the depth
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_BLOCK = 1 << 16


class _JsonHeader:
    """Parses hostile JSON: bounded depth and size before the parser runs; no duplicate keys, no NaN, no lone surrogates."""

    def __init__(self, source: ByteSource, data: bytes, *, offset: int, entries: int, commas: int, floats: bool = False) -> None:
        """`data` begins at `offset` of the file and may hold `entries` tensors with `commas` each."""
        self.source = source
        self.data = data
        self.offset = offset
        self.entries = entries
        self.commas = commas
        self.floats = floats

    def parse(self) -> dict[str, Any]:
        if not self.data.startswith(b"{"):
            looks = _foreign(self.data[:8])
            self._fail("E_JSON", f"this looks like {looks}" if looks else "the JSON must begin with '{'", 0)
        self._bound()
        try:
            value = json.loads(
                self.data.decode(),
                object_pairs_hook=self._object,
                parse_int=self._integer,
                parse_float=self._float,
                parse_constant=self._constant,
            )
        except UnicodeDecodeError as error:
            self._fail("E_JSON", "the JSON is not UTF-8", error.start)
        except json.JSONDecodeError as error:
            self._fail("E_JSON", f"the JSON is malformed: {error.msg}", error.pos)
        if not isinstance(value, dict):
            self._fail("E_JSON", "the JSON must be an object", 0)
        return value

    def _bound(self) -> None:
        """Refuse depth and counts that the parser would recurse into or allocate for: one pass, in blocks of fixed size."""
        # Escaped quotes out of the way, every other quote opens or closes a string.
        plain = self.data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        inside = False
        depth = brackets = commas = 0
        for begin in range(0, len(plain), _BLOCK):
            block = np.frombuffer(plain, np.uint8, min(_BLOCK, len(plain) - begin), begin)
            quoted = np.logical_xor.accumulate(block == ord('"')) ^ inside
            inside = bool(quoted[-1])
            bare = block[~quoted]
            steps = _STEPS[bare]
            depths = depth + np.cumsum(steps[steps != 0], dtype=np.int64)
            if len(depths):
                depth = int(depths[-1])
                if int(depths.max()) > MAX_DEPTH:
                    self._fail("E_LIMIT", "the JSON is nested too deep", begin)
            brackets += len(depths)
            commas += int(np.count_nonzero(bare == ord(",")))
            if brackets > 6 * self.entries + 8 or commas > self.commas * self.entries + 64:
                self._fail("E_LIMIT", f"the JSON holds more than {self.entries:,} tensors", begin)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                self._fail("E_DUP", f"the JSON key `{printable(key[:MAX_NAME])}` occurs twice", 0)
            self._text(key)
            if isinstance(value, str):
                self._text(value)
            out[key] = value
        return out

    def _text(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._fail("E_JSON", "the JSON holds half of a surrogate pair", 0)

    def _integer(self, text: str) -> int:
        if len(text) > 20:
            self._fail("E_OVERFLOW", f"the JSON holds an integer of {len(text)} digits", 0)
        return -1 if text == "-0" else int(text)  # "-0" is no count: let it be refused as negative

    def _float(self, text: str) -> float:
        if not self.floats:
            self._fail("E_JSON", f"the JSON holds the number {text[:32]}, expected integers", 0)
        return float(text)

    def _constant(self, text: str) -> NoReturn:
        self._fail("E_JSON", f"the JSON holds {text}, expected a number", 0)

    def _fail(self, code: str, message: str, at: int) -> NoReturn:
        self.source.fail(code, message, self.offset + at)


def _open_index(path: Path, sources: list[ByteSource]) -> tuple[dict[str, TensorSlot], dict[str, str]]:
    """All shards that an index names. File names are plain names beside the index, never paths."""
    index = ByteSource(path)
    sources.append(index)
    if index.size > MAX_INDEX:
        index.fail("E_LIMIT", f"the index takes {index.size:,} bytes, at most {MAX_INDEX:,} are allowed", None)
    header = _JsonHeader(index, index.read(0, index.size), offset=0, entries=MAX_INDEXED, commas=1, floats=True)
    weight_map = header.parse().get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        index.fail("E_JSON", "weight_map must map tensor names to file names", 0)
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_SHARDS:
        index.fail("E_LIMIT", f"names {len(files):,} files, at most {MAX_SHARDS:,} are allowed", None)
    sources.clear()
    index.close()
    tensors: dict[str, TensorSlot] = {}
    metadata: dict[str, str] = {}
    for shard, file in enumerate(files):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors", file):
            index.fail(
                "E_PATH", f"names the file {printable(file[:200])!r}, expected a plain name that ends in .safetensors", None
            )
        try:
            slots, found = _open_one(path.with_name(file), shard, sources)
        except NotFoundError:
            index.fail("E_PATH", f"the shard {file} is missing", None)
        metadata = metadata or found
        for name, slot in slots.items():
            if name in tensors:
                index.fail(
                    "E_DUP", f"the tensor `{printable(name)}` is in {sources[tensors[name].shard].path.name} and {file}", None
                )
            tensors[name] = slot
    for name, file in weight_map.items():
        if name not in tensors or sources[tensors[name].shard].path.name != file:
            index.fail("E_HASH", f"promises the tensor `{printable(name[:MAX_NAME])}` in {file}, which does not hold it", None)
    return tensors, metadata


def write_safetensors(
    path: Path | str, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32 and float16 arrays; the same input gives the same bytes. Atomic (see `atomic_write`).

    The header is written here because the safetensors library writes metadata in the order of a hash table that changes from run
    to run. Tensors are ordered by falling element size, then name, so that each is aligned to its element.
    """
    names = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16"}
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    end = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in names:
            raise TypeError(f"{name} is {array.dtype}, expected float32 or float16")
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).data)
