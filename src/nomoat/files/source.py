"""A regular file opened once: the descriptor that is checked is the descriptor that is read and mapped.

Headers are read with `pread`, which reports a file that shrank as an error. Tensor data is memory-mapped; a page that vanishes
from a mapped file raises SIGBUS in whoever touches it, so `map` checks the size again right before mapping, and long-lived users
(the engine) pack or copy out of the map instead of serving from it.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from nomoat.errors import FileFormatError, NotFoundError, printable


class ByteSource:
    """Read-only bytes of one regular file. `size` is what `fstat` said when it was opened."""

    def __init__(self, path: Path | str) -> None:
        """Open without ever blocking: a FIFO, device, socket or directory is refused at once.

        Raises NotFoundError, or FileFormatError E_PATH.
        """
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self.fd = -1
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer. It has no effect on regular files.
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            raise NotFoundError(f"{printable(str(path))}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise FileFormatError(f"cannot be opened: {reason}", code="E_PATH", path=path) from None
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileFormatError("is not a regular file; give the path of a model file", code="E_PATH", path=path)
        self.size = status.st_size

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes; E_TRUNCATED when the file ends before (also when it shrank since it was opened)."""
        data = os.pread(self.fd, count, offset)
        if len(data) == count:
            return data
        parts = [data]
        got = len(data)
        while got < count:  # a signal or a 2 GiB kernel limit cut the read short, or the file ends here
            data = os.pread(self.fd, count - got, offset + got)
            if not data:
                self.fail("E_TRUNCATED", f"the file ends {count - got:,} bytes too early", offset + got)
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def view(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """Read-only, zero-copy bytes of the map. The view keeps the map alive after `close`."""
        if self._map is None:
            if os.fstat(self.fd).st_size < self.size:
                self.fail("E_TRUNCATED", "the file shrank since it was opened", None)
            self._map = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8, count, offset)

    def fail(self, code: str, message: str, offset: int | None) -> NoReturn:
        """Raise the one typed error for this file."""
        raise FileFormatError(message, code=code, path=self.path, offset=offset)

    def close(self) -> None:
        """Give the descriptor back. Views already handed out stay valid until they are garbage."""
        self._map = None  # not unmapped by force: that would pull pages from under live views
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
