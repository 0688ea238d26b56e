"""One writer at a time: a lock on a file, held by the operating system, so that it dies with its owner."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nomoat.errors import ResourceError, printable

#: Windows locks byte ranges; one far behind the owner's note leaves the note readable for others.
_LOCK_BYTE = 1 << 20


@contextlib.contextmanager
def exclusive(path: Path, purpose: str, *, wait: float = 3600.0, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` for the block. A second writer waits up to `wait` seconds; `tell` is told once who holds it.

    Raises ResourceError E_LOCKED after the wait, E_LOCK where the file system cannot lock or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResourceError(
            f"cannot write the model store {path.parent}: {error.strerror}. Set NOMOAT_HOME to a folder that you may write",
            code="E_LOCK",
        ) from None
    try:
        deadline, told = time.monotonic() + wait, False
        while not _try_lock(fd, path):
            if not told and tell is not None:
                tell(f"waiting for {_owner(path)}, which is writing the model store")
                told = True
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"the model store {path.parent} has been in use by {_owner(path)} for {wait:.0f} s; "
                    "wait for it or stop it, then try again",
                    code="E_LOCKED",
                )
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()} {purpose}\n".encode())
        yield
    finally:
        os.close(fd)  # releases the lock, as does the death of this process


def _try_lock(fd: int, path: Path) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, _LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise ResourceError(
            f"{path}: this file system cannot lock files ({error.strerror}); set NOMOAT_HOME to a folder on a local disk",
            code="E_LOCK",
        ) from None
    return True


def _owner(path: Path) -> str:
    """The holder's own note, for a message: "process 123 (pull smollm2:135m)"."""
    try:
        pid, _, purpose = path.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    except OSError:
        pid = purpose = ""
    return f"process {printable(pid)} ({printable(purpose)})" if pid else "another process"
