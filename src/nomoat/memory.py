"""How much memory this computer has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory: all of it, and what is free now."""

    memory: int
    available: int


def this_memory() -> Memory:
    """Memory of this computer; limits of containers count."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _container_memory()
    return Memory(min(memory.total, limit), max(0, min(memory.available, limit - used)))


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(limit, used without file cache) of a Linux control group in bytes; a limit beyond every machine where there is none."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit, used - int(stat.get("file", 0))
    except (OSError, ValueError):  # no control groups, or "max"
        return 1 << 62, 0
