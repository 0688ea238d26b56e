"""GGUF v2 and v3, little-endian: header, metadata, tensor directory, split files.

    byte 0   "GGUF"        u32 version       u64 tensor count      u64 key count
    then     key count     x { string key, u32 value type, value }        string = u64 length + UTF-8
    then     tensor count  x { string name, u32 dims, u64[dims] (contiguous first), u32 type, u64 offset }
    then     padding to `general.alignment` (32 unless said), then the tensors, each padded likewise

Source: the GGUF specification in ggml's docs/gguf.md; limits and refusals: docs/reference/formats.md.
Nothing is allocated by a count before the bytes behind it are known to exist, and arrays are skipped, not read, until asked for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

import numpy as np
import numpy.typing as npt

from nomoat.errors import FileFormatError, NotFoundError, printable
from nomoat.files.cursor import Cursor
from nomoat.files.ggml import ADVICE, BLOCK_SHAPE, GgmlType
from nomoat.files.source import ByteSource

__all__ = [
    "BLOCK_SHAPE",
    "GgmlType",
    "GgufFile",
    "LazyArray",
    "Scalar",
    "TensorInfo",
    "ValueType",
    "open_gguf",
]

MAX_KEYS = 4_096  # real files hold under 100
MAX_TENSORS = 32_768  # the largest real mixture of experts with one tensor per expert holds about 1,400
MAX_KEY_BYTES = 65_535  # the specification's limit
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes with a final NUL
MAX_TEXT_BYTES = 64 << 20  # one metadata string; chat templates are under 100 KB, embedded tokenizer.json files 40 MB
MAX_ARRAY = 1 << 24  # elements of one array; vocabularies and merges are under 10^6
MAX_SHARDS = 1_024
ALIGNMENTS = frozenset(1 << bit for bit in range(3, 17))  # 8 bytes to 64 KiB
INT64_MAX = 2**63 - 1

Scalar = int | float | bool | str


class ValueType(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: NumPy type string and struct of every fixed-size value type.
_FIXED: dict[ValueType, tuple[str, struct.Struct]] = {
    ValueType.UINT8: ("u1", struct.Struct("<B")),
    ValueType.INT8: ("i1", struct.Struct("<b")),
    ValueType.UINT16: ("<u2", struct.Struct("<H")),
    ValueType.INT16: ("<i2", struct.Struct("<h")),
    ValueType.UINT32: ("<u4", struct.Struct("<I")),
    ValueType.INT32: ("<i4", struct.Struct("<i")),
    ValueType.FLOAT32: ("<f4", struct.Struct("<f")),
    ValueType.BOOL: ("u1", struct.Struct("<B")),
    ValueType.UINT64: ("<u8", struct.Struct("<Q")),
    ValueType.INT64: ("<i8", struct.Struct("<q")),
    ValueType.FLOAT64: ("<f8", struct.Struct("<d")),
}
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LazyArray:
    """An array of metadata that stays in the file until it is asked for. Valid while its GgufFile is open."""

    type: ValueType
    count: int
    _source: ByteSource
    _offset: int
    _nbytes: int
    _key: str

    def __len__(self) -> int:
        return self.count

    def numbers(self) -> npt.NDArray[Any]:
        """All elements, in the file's own type (bool for BOOL). E_TYPE for an array of strings, or a bool that is not 0 or 1."""
        if self.type is ValueType.STRING:
            self._source.fail("E_TYPE", f"`{self._key}` is an array of strings, expected numbers", self._offset)
        values = np.frombuffer(self._source.read(self._offset, self._nbytes), _FIXED[self.type][0])
        if self.type is ValueType.BOOL:
            if values.size and int(values.max()) > 1:
                self._source.fail("E_TYPE", f"`{self._key}` holds a bool that is neither 0 nor 1", self._offset)
            return values.view(np.bool_)
        return values

    def strings(self) -> list[str]:
        """All elements. E_TYPE for an array of numbers, E_UTF8 for bytes that are not UTF-8."""
        if self.type is not ValueType.STRING:
            self._source.fail("E_TYPE", f"`{self._key}` is an array of {self.type.name}, expected strings", self._offset)
        data = self._source.read(self._offset, self._nbytes)
        out: list[str] = []
        at = 0
        try:
            for _ in repeat(None, self.count):
                end = at + 8 + _U64.unpack_from(data, at)[0]
                out.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            self._source.fail("E_UTF8", f"`{self._key}`[{len(out)}] is not valid UTF-8", self._offset + at + 8)
        except struct.error:  # the file was changed between the walk that found the end and this read
            self._source.fail("E_TRUNCATED", f"`{self._key}` changed while it was read", self._offset + at)
        return out


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` in NumPy order (rows first, contiguous dimension last); `offset` from the start of file `shard`, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int
    shard: int


#: One tensor as the header states it: (name, shape in NumPy order, type, offset in the data section, bytes).
_Entry = tuple[str, tuple[int, ...], GgmlType, int, int]

T = TypeVar("T", int, float, bool, str)


class GgufFile:
    """An open GGUF model: `metadata`, `tensors` in file order, and their bytes. Close it, or use it as a context manager."""

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, Scalar | LazyArray],
        tensors: dict[str, TensorInfo],
        shards: list[ByteSource],
        spans: dict[str, tuple[int, int]],
    ) -> None:
        self.path = path
        self.version = version
        self.metadata: Mapping[str, Scalar | LazyArray] = MappingProxyType(metadata)
        self.tensors = tensors
        self._shards = shards
        self._spans = spans

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file of the model, in shard order."""
        return tuple(shard.path for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.size for shard in self._shards)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as they are in the file: read-only, zero-copy, flat. KeyError when there is no such tensor."""
        info = self.tensors[name]
        return self._shards[info.shard].view(info.offset, info.nbytes)

    def entry(self, key: str) -> bytes:
        """Key, value type and value as they are in the (first) file. KeyError when there is no such key."""
        begin, end = self._spans[key]
        return self._shards[0].read(begin, end - begin)

    def get_str(self, key: str, default: str | None = None) -> str:
        """A string. A missing key without default is E_ARCH, another type is E_TYPE; so for the other getters."""
        return self._get(key, str, default)

    def get_int(self, key: str, default: int | None = None) -> int:
        """An integer of any width; bool is not one."""
        return self._get(key, int, default)

    def get_float(self, key: str, default: float | None = None) -> float:
        """A float32 or float64; may be NaN or infinite."""
        return self._get(key, float, default)

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        """A bool."""
        return self._get(key, bool, default)

    def get_array(self, key: str) -> LazyArray:
        """An array."""
        value = self.metadata.get(key)
        if value is None:
            self.missing(key)
        if not isinstance(value, LazyArray):
            self._wrong_type(key, value, "an array")
        return value

    def missing(self, key: str) -> NoReturn:
        """Raise E_ARCH for a key that the file must have."""
        raise FileFormatError(f"required key `{printable(key)}` is missing", code="E_ARCH", path=self.path)

    def _get(self, key: str, kind: type[T], default: T | None) -> T:
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                self.missing(key)
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._wrong_type(key, value, kind.__name__)
        return value

    def _wrong_type(self, key: str, value: object, expected: str) -> NoReturn:
        found = f"an array of {value.type.name}" if isinstance(value, LazyArray) else type(value).__name__
        raise FileFormatError(f"`{printable(key)}` is {found}, expected {expected}", code="E_TYPE", path=self.path)

    def close(self) -> None:
        """Close the files. Views that `data` handed out stay valid."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_gguf(path: Path | str, *, require_contiguous: bool = True) -> GgufFile:
    """Open a GGUF file, or all shards of a split one given any of them (`name-00001-of-00003.gguf`).

    `require_contiguous=False` allows holes between tensors and bytes after the last one; tensors still may not overlap or leave
    the file. Raises NotFoundError, or FileFormatError with one of the codes in docs/reference/formats.md.
    """
    path = Path(path)
    sources: list[ByteSource] = []
    try:
        first = _Shard(_open(path, sources), 0, require_contiguous)
        count = first.split("split.count", 1)
        if count <= 1:
            tensors = {t.name: t for t in first.tensors}
            return GgufFile(path, first.version, first.metadata, tensors, sources, first.spans)
        return _open_split(path, first, count, sources, require_contiguous)
    except BaseException:
        for source in sources:
            source.close()
        raise


def _open(path: Path, sources: list[ByteSource]) -> ByteSource:
    sources.append(ByteSource(path))
    return sources[-1]


def _open_split(path: Path, given: _Shard, count: int, sources: list[ByteSource], require_contiguous: bool) -> GgufFile:
    """All shards of a split model. Names come from the path that was given, never from inside a file."""
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if count > MAX_SHARDS:
        given.source.fail("E_LIMIT", f"split into {count:,} files, at most {MAX_SHARDS:,} are allowed", None)
    if named is None:
        given.source.fail("E_PATH", f"is one of {count} parts, but its name does not end in -00001-of-{count:05}.gguf", None)
    if int(named[3]) != count:
        given.source.fail("E_HASH", f"the name says {int(named[3])} parts, the file says {count}", None)
    given.source.close()
    sources.clear()
    shards: list[_Shard] = []
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        part = path.with_name(f"{named[1]}-{index + 1:05}-of-{count:05}.gguf")
        try:
            shard = _Shard(_open(part, sources), index, require_contiguous)
        except NotFoundError:
            given.source.fail("E_PATH", f"part {index + 1} of {count} is missing: {printable(part.name)}", None)
        found = shard.split("split.no", -1), shard.split("split.count", -1)
        if found != (index, count):
            claim = f"part {found[0] + 1} of {found[1]}"
            shard.source.fail("E_HASH", f"says it is {claim}, expected part {index + 1} of {count}", None)
        shards.append(shard)
        for info in shard.tensors:
            if info.name in tensors:
                shard.source.fail("E_DUP", f"tensor `{info.name}` is also in part {tensors[info.name].shard + 1}", None)
            tensors[info.name] = info
    total = shards[0].split("split.tensors.count", len(tensors))
    if total != len(tensors):
        shards[0].source.fail("E_HASH", f"the parts hold {len(tensors)} tensors, the first part promises {total}", None)
    return GgufFile(path, shards[0].version, shards[0].metadata, tensors, sources, shards[0].spans)


class _Shard:
    """One parsed file: version, metadata and tensors."""

    def __init__(self, source: ByteSource, index: int, require_contiguous: bool) -> None:
        self.source = source
        self._cursor = Cursor(source)
        tensor_count, key_count = self._counts()
        self.metadata: dict[str, Scalar | LazyArray] = {}
        self.spans: dict[str, tuple[int, int]] = {}  # key -> first byte of the pair, and the byte behind it
        self.alignment = 32
        for _ in range(key_count):
            self._key_value()
        directory = [self._tensor() for _ in range(tensor_count)]
        self.tensors = _lay_out(self._cursor, directory, self.alignment, index, require_contiguous)

    def split(self, key: str, default: int) -> int:
        """An integer of the `split.` group."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.source.fail("E_TYPE", f"`{key}` must be an integer", None)
        return value

    def _counts(self) -> tuple[int, int]:
        cursor = self._cursor
        magic = cursor.u32("the magic").to_bytes(4, "little")
        if magic != b"GGUF":
            known = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"PK\3\4": "ZIP"}.get(magic)
            hint = f"this is a {known} file" if known else f"the file begins with {magic!r}"
            cursor.fail("E_MAGIC", f"not a GGUF file: {hint}, expected b'GGUF'", 0)
        self.version = cursor.u32("the version")
        if self.version & 0xFFFF == 0 and self.version:
            cursor.fail("E_VERSION", "wrong byte order: a big-endian file; get or convert a little-endian one", 4)
        if self.version not in (2, 3):
            cursor.fail("E_VERSION", f"version {self.version} is not supported, expected 2 or 3", 4)
        counts = []
        for what, limit in (("tensors", MAX_TENSORS), ("keys", MAX_KEYS)):
            at = cursor.position
            count = cursor.u64(f"the number of {what}")
            if count > limit:
                cursor.fail("E_LIMIT", f"claims {count:,} {what}, at most {limit:,} are allowed", at)
            counts.append(count)
        return counts[0], counts[1]

    def _key_value(self) -> None:
        cursor = self._cursor
        start = cursor.position
        key = cursor.text(min(MAX_KEY_BYTES, cursor.source.size), "a key")
        if not key or not key.isprintable():
            cursor.fail("E_TYPE", f"the key {printable(key)!r} is empty or holds control characters", start)
        if key in self.metadata:
            cursor.fail("E_DUP", f"the key `{key}` occurs twice", start)
        value = self._value(key, self._value_type(key))
        self.metadata[key] = value
        self.spans[key] = (start, cursor.position)
        if key == "general.alignment" and value not in ALIGNMENTS:
            cursor.fail("E_LIMIT", f"general.alignment is {value}, expected a power of two from 8 to 65,536", start)

    def _value_type(self, what: str) -> ValueType:
        at = self._cursor.position
        number = self._cursor.u32(f"the type of `{what}`")
        try:
            return ValueType(number)
        except ValueError:
            self._cursor.fail("E_TYPE", f"`{what}` has the unknown value type {number}", at)

    def _value(self, key: str, kind: ValueType) -> Scalar | LazyArray:
        cursor = self._cursor
        at = cursor.position
        if key == "general.alignment":
            if kind is not ValueType.UINT32:
                cursor.fail("E_TYPE", f"general.alignment is {kind.name}, expected UINT32", at)
            self.alignment = cursor.u32(key)
            return self.alignment
        if kind is ValueType.STRING:
            return cursor.text(MAX_TEXT_BYTES, f"the value of `{key}`")
        if kind is ValueType.ARRAY:
            return self._array(key)
        value = cursor.fixed(_FIXED[kind][1], f"the value of `{key}`")
        if kind is ValueType.BOOL:
            if value not in (0, 1):
                cursor.fail("E_TYPE", f"`{key}` is the bool {value}, expected 0 or 1", at)
            return bool(value)
        return value

    def _array(self, key: str) -> LazyArray:
        cursor = self._cursor
        what = f"the array `{key}`"
        kind = self._value_type(key)
        at = cursor.position
        if kind is ValueType.ARRAY:
            cursor.fail("E_TYPE", f"`{key}` is an array of arrays, which no model uses", at - 4)
        count = cursor.u64(f"the length of {what}")
        width = 8 if kind is ValueType.STRING else _FIXED[kind][1].size
        if count * width > INT64_MAX:
            cursor.fail("E_OVERFLOW", f"`{key}` claims {count:,} elements", at)
        if count > MAX_ARRAY:
            cursor.fail("E_LIMIT", f"`{key}` claims {count:,} elements, at most {MAX_ARRAY:,} are allowed", at)
        start = cursor.position
        if kind is ValueType.STRING:
            cursor.skip_strings(count, what)
        else:
            cursor.skip(count * width, what)
        return LazyArray(kind, count, cursor.source, start, cursor.position - start, key)

    def _tensor(self) -> _Entry:
        cursor = self._cursor
        start = cursor.position
        name = cursor.text(MAX_NAME_BYTES, "a tensor name")
        if not name:
            cursor.fail("E_LIMIT", "a tensor has an empty name", start)
        if not name.isprintable() or ".." in name or name.startswith("/"):
            cursor.fail("E_PATH", f"the tensor name {printable(name)!r} holds control characters or looks like a path", start)
        dims = cursor.u32(f"the dimensions of `{name}`")
        if not 1 <= dims <= 4:
            cursor.fail("E_SHAPE", f"`{name}` has {dims:,} dimensions, expected 1 to 4", cursor.position - 4)
        sizes = cursor.u64s(dims, f"the shape of `{name}`")
        at = cursor.position
        kind = self._tensor_type(name, cursor.u32(f"the type of `{name}`"), at)
        elements = 1
        for size in sizes:
            elements *= size
        if elements == 0:
            cursor.fail("E_SHAPE", f"`{name}` has shape {sizes}: no elements", at)
        block, block_bytes = BLOCK_SHAPE[kind]
        nbytes = -(-elements // block) * block_bytes
        if max(elements, nbytes + self.alignment) > INT64_MAX:
            cursor.fail("E_OVERFLOW", f"`{name}` has shape {sizes}: more bytes than 63 bits can count", at)
        if sizes[0] % block:
            cursor.fail("E_SHAPE", f"`{name}` has rows of {sizes[0]:,}, not a multiple of {kind.name}'s {block}", at)
        return name, sizes[::-1], kind, cursor.u64(f"the offset of `{name}`"), nbytes

    def _tensor_type(self, name: str, number: int, at: int) -> GgmlType:
        try:
            kind = GgmlType(number)
        except ValueError:
            self._cursor.fail("E_DTYPE", f"`{name}` has the unknown or retired tensor type {number}; {ADVICE}", at)
        if kind not in BLOCK_SHAPE:
            usable = ", ".join(member.name for member in BLOCK_SHAPE)
            what = f"`{name}` is stored as {kind.name}, which nomoat does not support; {ADVICE} (supported: {usable})"
            self._cursor.fail("E_DTYPE", what, at)
        return kind


def _lay_out(cursor: Cursor, directory: list[_Entry], alignment: int, shard: int, require_contiguous: bool) -> list[TensorInfo]:
    """Absolute offsets, after proving that tensors neither overlap nor leave the file, and (unless told) leave no holes.

    A file cut short keeps a correct directory, so it is E_TRUNCATED; a wrong offset or size is E_OFFSET.
    """
    if sum(nbytes + alignment for *_, nbytes in directory) > INT64_MAX:
        cursor.fail("E_OVERFLOW", "the sizes of all tensors sum to more bytes than 63 bits can count")
    seen: set[str] = set()
    for name, *_ in directory:
        if name in seen:
            cursor.fail("E_DUP", f"the tensor `{name}` occurs twice")
        seen.add(name)
    data = cursor.position + -cursor.position % alignment
    expected = 0
    end = 0
    for name, _, _, offset, nbytes in sorted(directory, key=lambda entry: entry[3]):
        if offset % alignment:
            cursor.fail("E_OFFSET", f"`{name}` begins at {offset:,}, not a multiple of the alignment {alignment}")
        if offset < expected:
            cursor.fail("E_OFFSET", f"`{name}` begins at {offset:,} and overlaps the tensor that ends at {end:,}")
        if offset > expected and (require_contiguous or data + offset > cursor.source.size):
            cursor.fail("E_OFFSET", f"`{name}` begins at {offset:,}, expected {expected:,}: a hole")
        end = offset + nbytes
        expected = end + -end % alignment
    size = cursor.source.size
    if data + end > size:
        if directory:
            cursor.fail("E_TRUNCATED", f"the tensors end at byte {data + end:,}, the file at {size:,}; get the file again", size)
        data = size  # no tensors: the padding may be missing too
    if require_contiguous and size - (data + end) >= alignment:
        cursor.fail("E_OFFSET", f"{size - data - end:,} bytes follow the last tensor", data + end)
    return [TensorInfo(name, shape, kind, data + offset, nbytes, shard) for name, shape, kind, offset, nbytes in directory]
