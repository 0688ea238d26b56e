"""One hostile file, and how it is checked."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nomoat.errors import InputError

MEMORY_LIMIT = 16 << 20  # bytes
TIME_LIMIT = 4 * 0.050  # seconds of CPU; four times the goal, because test machines are slow and busy


@dataclass(frozen=True)
class Case:
    """A variant of a row of bad inputs. `codes` holds every right answer; empty where the file must load."""

    row: str
    name: str
    data: bytes
    codes: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.row}-{self.name}"


def case(row: str, name: str, data: bytes, *codes: str) -> Case:
    return Case(row, name, data, codes)


def check(path: Path, codes: tuple[str, ...], use: Callable[[Path], object]) -> InputError | None:
    """Use the file: one typed error of `codes` with exit code 2 (none where `codes` is empty), fast, in little memory,
    and with the folder as it was."""
    before = _folder(path.parent)
    error, seconds = _timed(use, path)
    for _ in range(2):  # what a neighbour of a busy machine slows down once is fast the next time
        if TIME_LIMIT < seconds < 3 * TIME_LIMIT:
            seconds = _timed(use, path)[1]
    tracemalloc.start()
    try:
        use(path)
    except InputError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if codes:
        assert error is not None, f"{path.name} was accepted, expected {codes}"
        assert error.exit_code == 2
        assert error.code in codes, f"{error.code} ({error}), expected {codes}"
        assert str(error).isprintable(), "text of the file reached the message raw"
    elif error is not None:
        pytest.fail(f"{path.name} must load: {error}")
    assert peak <= MEMORY_LIMIT, f"{peak:,} bytes"
    assert seconds <= TIME_LIMIT, f"{seconds * 1e3:.0f} ms"
    assert _folder(path.parent) == before, "something was written"
    return error


def _timed(use: Callable[[Path], object], path: Path) -> tuple[InputError | None, float]:
    began = time.process_time()
    try:
        use(path)
    except InputError as raised:
        return raised, time.process_time() - began
    return None, time.process_time() - began


def _folder(folder: Path) -> set[tuple[str, int]]:
    return {(str(entry), entry.stat().st_size) for entry in folder.rglob("*") if entry.is_file()}
