"""Files and folders that appear whole or not at all, also across `kill -9` and power loss.

    temporary name in the same folder -> write -> fsync -> rename -> fsync of the folder

Only when the context manager returns is the file saved. A killed process may leave a temporary behind, named
`.NAME.PID-RANDOM.tmp`; `sweep` removes those whose process is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

from nomoat.errors import InputError, ResourceError, printable

_TEMPORARY = re.compile(r"\..*\.(\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` when the block ends, and leaves no trace when it raises.

    Raises ResourceError E_DISK when the disk is full, InputError E_PATH when the folder cannot be written, and OSError E_IO
    faults as they are: after a failed fsync the content is unknown, so nothing is retried.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _explain(error, path)
        raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` (a folder or nothing) when the block ends.

    Raises as `atomic_write`, and InputError E_PATH where a file has that name.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays, and the folder is replaced
    if path.exists() and not path.is_dir():
        raise InputError(f"{printable(str(path))}: is a file, expected a folder or nothing", code="E_PATH")
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        if path.exists():
            _exchange(temporary, path)  # `temporary` now names the old folder
        else:
            os.rename(temporary, path)
        fsync_folder(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            _explain(error, path)
        raise


def sweep(folder: Path) -> list[Path]:
    """Remove temporaries in `folder` that a dead process left behind; return them."""
    import psutil

    removed = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and not psutil.pid_exists(int(match[1])):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
            removed.append(entry)
    return removed


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` survive power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # A name may take 255 bytes; the temporary's must fit too.
    stem = path.name.encode()[:200].decode(errors="ignore")
    return path.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _fsync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(root))


def _exchange(new: Path, old: Path) -> None:
    """Swap two names in one step where the system can; elsewhere there is an instant in which `old` does not exist."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(new), os.fsencode(old)
    status = -1
    if sys.platform == "darwin":
        status = library.renamex_np(*names, 2)  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        at_cwd = -100
        status = library.renameat2(at_cwd, names[0], at_cwd, names[1], 2)  # RENAME_EXCHANGE
    if status == 0:
        return
    aside = _temporary(old)
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _explain(error: OSError, path: Path) -> NoReturn:
    where = printable(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise ResourceError(
            f"{where}: {error.strerror}; nothing was changed. Free some space and try again", code="E_DISK"
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        raise InputError(f"{where}: cannot be written: {error.strerror}", code="E_PATH") from error
    raise error
