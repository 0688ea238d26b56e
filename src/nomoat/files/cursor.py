"""Front-to-back reading of a binary header: every length is compared with the bytes that are left before it is used."""

from __future__ import annotations

import struct
from itertools import repeat
from typing import NoReturn

import numpy as np

from nomoat.files.source import ByteSource


class Cursor:
    """Reads a header front to back through one window of bounded size."""

    WINDOW = 1 << 20
    CHUNK = 4_096  # strings skipped per step

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.position = 0
        self._base = 0
        self._window = b""

    def take(self, count: int, what: str) -> int:
        """Index in the window of the next `count` bytes, and move past them."""
        at = self.position - self._base
        if at + count > len(self._window):
            left = self.source.size - self.position
            if count > left:
                self.fail("E_TRUNCATED", f"the file ends inside {what}: {count:,} bytes needed, {left:,} left")
            self._window = self.source.read(self.position, max(count, min(self.WINDOW, left)))
            self._base = self.position
            at = 0
        self.position += count
        return at

    def fixed(self, layout: struct.Struct, what: str) -> int | float:
        value: int | float = layout.unpack_from(self._window, self.take(layout.size, what))[0]
        return value

    def u32(self, what: str) -> int:
        at = self.take(4, what)
        return int.from_bytes(self._window[at : at + 4], "little")

    def u64(self, what: str) -> int:
        at = self.take(8, what)
        return int.from_bytes(self._window[at : at + 8], "little")

    def u64s(self, count: int, what: str) -> tuple[int, ...]:
        at = self.take(8 * count, what)
        return struct.unpack_from(f"<{count}Q", self._window, at)

    def text(self, limit: int, what: str) -> str:
        """A string of at most `limit` bytes: E_LIMIT, E_TRUNCATED or E_UTF8 otherwise."""
        start = self.position
        length = self.u64(f"the length of {what}")
        if length > limit:
            self.fail("E_LIMIT", f"{what} is {length:,} bytes long, at most {limit:,} are allowed", start)
        at = self.take(length, what)
        try:
            return self._window[at : at + length].decode()
        except UnicodeDecodeError:
            self.fail("E_UTF8", f"{what} is not valid UTF-8", start + 8)

    def skip(self, count: int, what: str) -> None:
        left = self.source.size - self.position
        if count > left:
            self.fail("E_TRUNCATED", f"the file ends inside {what}: {count:,} bytes needed, {left:,} left")
        self.position += count

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over `count` strings without keeping them."""
        while count:
            step = min(count, self.CHUNK)
            if not self._skip_short_strings(step):
                for _ in range(step):
                    self.skip(self.u64(what), what)
            count -= step

    def _skip_short_strings(self, count: int) -> bool:
        """Walk `count` strings guessing that each is under 256 bytes, so that one byte is its length; then check the guess.

        A third of the time of reading every length whole. False, with nothing moved, when the guess or the window does not hold.
        """
        at = self.position - self._base
        if at + self.CHUNK * 64 > len(self._window) and self._base + len(self._window) < self.source.size:
            self._window = self.source.read(self.position, min(self.WINDOW, self.source.size - self.position))
            self._base, at = self.position, 0
        window = self._window
        starts = [at]
        try:
            starts += [at := at + 8 + window[at] for _ in repeat(None, count)]
        except IndexError:
            return False
        if at > len(window):
            return False
        lengths = np.ndarray((len(window) - 7,), "<u8", window, strides=(1,))[np.array(starts[:-1])]
        if int(lengths.max()) > 255:
            return False
        self.position = self._base + at
        return True

    def fail(self, code: str, message: str, offset: int | None = None) -> NoReturn:
        self.source.fail(code, message, self.position if offset is None else offset)
