"""Seeded random numbers that are the same bytes everywhere: raw words of PCG64 and exact arithmetic on them, no libm.

Every tensor has a stream of its own, named after it, so that its values do not depend on which tensors are made, or when.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

_LOW = np.uint64(0x0000FFFF0000FFFF)
#: Standard deviation of a sum of four numbers that are uniform in 0..65535.
_SPREAD = ((65536.0**2 - 1) / 3) ** 0.5


class Stream:
    """The random words of one tensor. `skip` words are passed over first."""

    def __init__(self, seed: int, name: str, skip: int = 0) -> None:
        self._bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
        if skip:
            self._bits.advance(skip)

    def words(self, count: int) -> Words:
        found: Words = self._bits.random_raw(count)
        return found

    def bytes(self, count: int) -> Bytes:
        """`count` random bytes; of the last word the rest is dropped."""
        return self.words(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]

    def normals(self, count: int) -> npt.NDArray[np.float32]:
        """About normal with deviation 1 (a sum of four uniform numbers, at most 3.5 away from 0), one word each."""
        words = self.words(count)
        pairs = (words & _LOW) + ((words >> np.uint64(16)) & _LOW)
        sums = ((pairs & np.uint64(0xFFFFFFFF)) + (pairs >> np.uint64(32))).astype(np.int32)
        return (sums - np.int32(2 * 65535)).astype(np.float32) * np.float32(1 / _SPREAD)
