"""A data file as text pieces with line numbers: lines, or the elements of one JSON array.

Nothing here holds more than one piece, so a file is rejected at the cost of its longest allowed line. Only regular
files are opened, nothing is decompressed, and nothing that a row mentions (paths, URLs) is ever looked at.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from nomoat.data.strict_json import MAX_DEPTH
from nomoat.errors import DataError

# One row: about a quarter of a million tokens. Text may grow fourfold when decoded (one emoji makes Python use four
# bytes for every character) and is held twice while parsed, beside the objects that strict_json.MAX_VALUES allows:
# together that keeps a rejected file under 16 MiB.
MAX_ROW_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 10

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 LE starts with the first of them
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive (or .xlsx): unpack or export it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"BZh": "bzip2-compressed: unpack it first (bunzip2)",
    b"\xfd7zXZ": "xz-compressed: unpack it first (unxz)",
    b"PAR1": "a Parquet file: write it as .jsonl first (pandas: to_json(orient='records', lines=True))",
    b"GGUF": "a GGUF model: expected rows of text",
    b"\x80\x04": "a pickle file, which can run code: refused",
    b"\x80\x05": "a pickle file, which can run code: refused",
    b"SQLite format 3": "a SQLite database: export a table as .csv first",
}


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Raises DataError: E_PATH, E_TYPE (a known binary format), E_UTF8 (UTF-16)."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise DataError(f"cannot read the data file: {reason}. Check the path", code="E_PATH", path=path) from None
    if not stat.S_ISREG(mode):
        kind = "a folder: name one file in it" if stat.S_ISDIR(mode) else "not a regular file (pipe, socket or device)"
        raise DataError(f"this is {kind}", code="E_PATH", path=path)
    try:
        file = path.open("rb")
    except OSError as fault:
        raise DataError(f"cannot open the data file: {fault.strerror}", code="E_PATH", path=path) from None
    with file:
        head = file.read(16)
        file.seek(0)
        if head.startswith(_UTF16):
            message = "the text is UTF-16: convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)"
            raise DataError(message, code="E_UTF8", path=path, line=1)
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                raise DataError(f"this is {what}", code="E_TYPE", path=path)
        yield file


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file: the same that `lines` and `array_elements` compute on the way."""
    digest = hashlib.sha256()
    with open_data(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_unchanged(path: Path, digest: str) -> None:
    """Raises DataError E_HASH when the file is not the one that was read (call at epoch edges and on resume)."""
    found = file_digest(path)
    if found != digest:
        message = f"the file changed since it was read (sha256 {found[:12]}..., expected {digest[:12]}...). Start a new run"
        raise DataError(message, code="E_HASH", path=path)


def decode(raw: bytes | bytearray, path: Path, line: int) -> str:
    """UTF-8 without NUL. Raises DataError E_UTF8 with the line on which the fault is."""
    try:
        if b"\0" in raw:
            at, what = raw.index(b"\0"), "a NUL byte (UTF-16 or a binary file?)"
        else:
            return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        at, what = fault.start, f"byte 0x{raw[fault.start]:02x}, which is not UTF-8 (latin-1?)"
    line += raw.count(b"\n", 0, at)
    message = f"{what}; expected UTF-8: convert it first (iconv -f LATIN1 -t UTF-8)"
    raise DataError(message, code="E_UTF8", path=path, line=line)


def lines(file: BinaryIO, path: Path, digest: Digest) -> Iterator[tuple[int, str]]:
    """(line number, text without the line end); a byte-order mark and CRLF are taken off. E_LIMIT, E_UTF8."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        digest.update(raw)
        number += 1
        if len(raw) > MAX_ROW_BYTES:
            message = f"the line is longer than {MAX_ROW_BYTES:,} bytes; split it into several rows"
            raise DataError(message, code="E_LIMIT", path=path, line=number)
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        yield number, decode(raw.removesuffix(b"\n").removesuffix(b"\r"), path, number)


_STRUCTURE = re.compile(rb'["\\\[\]{},\n]')


class _Splitter:
    """Cuts a JSON array into the text of its elements: counts brackets, skips strings, parses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0
        self.in_string = False
        self.escaped = False  # the chunk ended on a backslash
        self.line = 1
        self.done = False
        self.elements = 0
        self.pending = bytearray()  # of the current element
        self.first_line = 1  # where `pending` starts

    def fault(self, message: str, code: str = "E_JSON") -> DataError:
        return DataError(message, code=code, path=self.path, line=self.line)

    def _close(self, *, last: bool) -> Iterator[tuple[int, str]]:
        """The element that a comma or the closing bracket ends."""
        text = self.pending.strip()
        line = self.first_line + self.pending.count(b"\n", 0, self.pending.find(text[:1]))
        self.pending.clear()
        if text:
            self.elements += 1
            yield line, decode(text, self.path, line)
        elif not last or self.elements:
            raise self.fault("expected a value beside the comma")
        self.first_line = self.line

    def feed(self, chunk: bytes) -> Iterator[tuple[int, str]]:
        """Elements that end inside `chunk`."""
        begin = skip = 0
        if self.escaped:
            skip, self.escaped = 1, False
        for match in _STRUCTURE.finditer(chunk):
            at, sign = match.start(), match[0]
            self.line += sign == b"\n"
            if at < skip or sign == b"\n":
                continue
            if self.in_string:
                if sign == b"\\":
                    skip = at + 2
                elif sign == b'"':
                    self.in_string = False
            elif sign == b'"':
                self.in_string = True
            elif sign in b"[{":
                self.depth += 1
                if self.depth > MAX_DEPTH + 1:
                    raise self.fault(f"nested deeper than {MAX_DEPTH} levels", "E_LIMIT")
                if self.depth == 1:
                    begin = at + 1
                    self.first_line = self.line
            elif sign in b"]}":
                self.depth -= 1
                if self.depth == 0:
                    self.pending += chunk[begin:at]
                    yield from self._close(last=True)
                    self.done, begin = True, at + 1
                    break
            elif sign == b"," and self.depth == 1:
                self.pending += chunk[begin:at]
                begin = at + 1
                yield from self._close(last=False)
        self.escaped = skip > len(chunk)
        self.pending += chunk[begin:]
        if self.done and self.pending.strip():
            raise self.fault("text after the end of the array")
        if len(self.pending) > MAX_ROW_BYTES:
            message = f"one element is longer than {MAX_ROW_BYTES:,} bytes; split it into several rows"
            raise DataError(message, code="E_LIMIT", path=self.path, line=self.first_line)


def array_elements(file: BinaryIO, path: Path, digest: Digest) -> Iterator[tuple[int, str]]:
    """(line on which it starts, text) of each element of the one JSON array that the file holds.

    The first byte that is no white space must be `[` (see `starts_array`). Raises DataError: E_JSON, E_LIMIT, E_UTF8.
    """
    splitter = _Splitter(path)
    first = True
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        if first:
            chunk, first = chunk.removeprefix(codecs.BOM_UTF8), False
        if splitter.done:
            if chunk.strip():
                raise splitter.fault("text after the end of the array")
            continue
        yield from splitter.feed(chunk)
    if not splitter.done:
        raise splitter.fault("the file ends inside the array; expected `]`", "E_TRUNCATED")


def starts_array(file: BinaryIO) -> bool:
    """Whether the first character is `[`; the position is put back. White space beyond 64 KiB is not searched."""
    head = file.read(_CHUNK_BYTES)
    file.seek(0)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
