"""What this machine can do at most: multiply-adds of the instructions that the kernels use, and bytes read.

The roofline model (Williams, Waterman and Patterson 2009): work that does `m` multiply-adds and reads `b` bytes takes at least
max(m / multiply-adds per second, b / bytes per second).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nomoat import _native

#: int8: four-bit codes with one-digit activations; int16: activations as words, where a level has that; bf16 and f32: training.
KINDS = ("int8", "int16", "bf16", "f32")
KILOBYTE, MEGABYTE = 1 << 10, 1 << 20
#: A first-level cache, second-level caches, a last-level cache, main memory.
WORKING_SETS = (16 * KILOBYTE, 256 * KILOBYTE, 2 * MEGABYTE, 16 * MEGABYTE, 96 * MEGABYTE, 384 * MEGABYTE)
SHORT, REPEATS = 0.02, 5  # seconds of one measurement; the best of five counts, because others use the machine too


@dataclass(frozen=True)
class Peaks:
    """With `threads` threads: multiply-adds per second by kind (0: not at this level), bytes per second by working-set size."""

    threads: int
    multiply_adds: dict[str, float]
    read: dict[int, float]


def best_rate(work: Callable[[int], float], first: int = 1) -> float:
    """Units per second of `work(times)`, which returns the units done: the best of REPEATS measurements of SHORT seconds."""
    times = first
    while True:
        began = time.perf_counter()
        units = work(times)
        seconds = time.perf_counter() - began
        if seconds >= SHORT / 4:
            break
        times *= 4
    times = max(1, int(times * SHORT / seconds))
    best = units / seconds
    for _ in range(REPEATS):
        began = time.perf_counter()
        units = work(times)
        best = max(best, units / (time.perf_counter() - began))
    return best


def multiply_adds(kind: str) -> float:
    """Multiply-adds per second of all threads; 0 where this level has no such kernel."""
    return 0.0 if _native.peak(kind, 1) == 0 else best_rate(lambda steps: float(_native.peak(kind, steps)), 1024)


def reader(size: int) -> Callable[[], float]:
    """What tells the bytes per second at which all threads together read `size` bytes again and again, each its own share."""
    data = np.ones(size, np.uint8)

    def read(times: int) -> float:
        _native.read_all(data, times)
        return float(size * times)

    return lambda: best_rate(read)


def read_bandwidth(size: int) -> float:
    """Bytes per second of `reader`, once."""
    return reader(size)()


def measure(threads: Sequence[int], working_sets: Sequence[int] = WORKING_SETS) -> list[Peaks]:
    """One row for each number of threads. The engine's own number is put back."""
    before = _native.threads()
    try:
        rows = []
        for count in threads:
            _native.set_threads(count)
            rows.append(
                Peaks(
                    count,
                    {kind: multiply_adds(kind) for kind in KINDS},
                    {size: read_bandwidth(size) for size in working_sets},
                )
            )
        return rows
    finally:
        _native.set_threads(before)
