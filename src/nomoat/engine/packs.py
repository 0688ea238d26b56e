"""The folder of packed weights stays within a size: what was used longest ago goes first, what is in use stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO


def hold(pack: IO[bytes]) -> None:
    """Marks an open pack as used now, and as in use for as long as it is open or mapped: a mapping keeps the file open."""
    os.utime(pack.name)  # a file system mounted with noatime does not note reads; the time of writing says nothing else here
    if sys.platform != "win32":  # there, a mapped file cannot be removed
        import fcntl

        fcntl.flock(pack, fcntl.LOCK_SH | fcntl.LOCK_NB)


def trim(folder: Path, limit: int) -> None:
    """Removes packs, the one used longest ago first, until the rest takes at most `limit` bytes or is in use."""
    packs = [(stat.st_mtime_ns, stat.st_size, path) for path in folder.glob("*.pack") if (stat := _stat(path))]
    total = sum(size for _, size, _ in packs)
    for _, size, path in sorted(packs):
        if total <= limit:
            return
        if _remove(path):
            total -= size


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # another process has just removed it
        return None


def _remove(path: Path) -> bool:
    try:
        with path.open("rb") as pack:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(pack, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        if sys.platform == "win32":
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:  # in use, or not ours to remove
        return False
    return True
