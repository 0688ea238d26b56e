"""Random quantized blocks, made as bytes: codes are random, scales such that a weight has the deviation asked for and mean 0.

A quantizer that starts from floats takes hours for a model of 8 billion weights; speed, memory and correctness of a reader are
the same on these. Layouts: ggml's block structs, see native/quant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tools.synthetic.randomness import Bytes, Stream

#: Bytes that are made at a time.
CHUNK_BYTES = 2 << 20
#: The code books of IQ4 and of MXFP4.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Layout:
    """A block of `columns` weights in `size` bytes: weight = d * (scale of its part) * code, less a minimum where there is one.

    `spread` is the deviation of a weight where d is 1; the float16 `d` begins at byte `d`, and at `low` a second one that is
    `low_factor` * d. Without `low`, signs of d or of the scales are random, because codes are not centred. `repair` turns
    random bytes into a valid block. `power_of_two`: d is a byte e that stands for 2^(e - 128), the same in all blocks.
    """

    columns: int
    size: int
    spread: float
    d: int = 0
    low: int | None = None
    low_factor: float = 0.0
    signed: bool = False
    power_of_two: bool = False
    repair: Callable[[Bytes], None] | None = None


def _no_lowest(blocks: Bytes) -> None:
    """Q8_0: no quantizer makes the code -128."""
    codes = blocks[:, 2:].view(np.int8)
    np.maximum(codes, -127, out=codes)


def _large_nibbles(blocks: Bytes) -> None:
    """Q2_K: 16 bytes of a scale and a minimum of 4 bits each: 8 at least, as in blocks whose parts are alike."""
    blocks[:, :16] |= 0x88


def _large_scales(blocks: Bytes) -> None:
    """Q4_K and Q5_K: 12 bytes of 8 scales and 8 minima of 6 bits each: 32 at least.

    Bytes 0-3: scales 0-3, above them two high bits of scales 4-7. Bytes 4-7: the same of the minima. Bytes 8-11: low bits.
    """
    blocks[:, 4:12] |= 0xA0


def _square(values: npt.ArrayLike) -> float:
    """Mean square."""
    return float((np.asarray(values, np.float64) ** 2).mean())


def _centred(codes: int) -> float:
    """Mean square of 0..codes - 1 around their middle."""
    return (codes**2 - 1) / 12


def _affine(scales: range, codes: int) -> float:
    """Deviation of d * (scale * code - minimum * middle of the codes), scale and minimum both out of `scales`."""
    middle = (codes - 1) / 2
    return math.sqrt(_square(scales) * _centred(codes) + 2 * middle**2 * _centred(len(scales)))


#: Scales of Q3_K and IQ4_XS, and of Q6_K.
_K3, _K6 = _square(range(-32, 32)), _square(range(-128, 128))

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(32, 18, _square(range(-8, 8)) ** 0.5, signed=True),
    "Q4_1": Layout(32, 20, _centred(16) ** 0.5, low=2, low_factor=-7.5, signed=True),
    "Q5_0": Layout(32, 22, _square(range(-16, 16)) ** 0.5, signed=True),
    "Q5_1": Layout(32, 24, _centred(32) ** 0.5, low=2, low_factor=-15.5, signed=True),
    "Q8_0": Layout(32, 34, _square(range(-127, 128)) ** 0.5, signed=True, repair=_no_lowest),
    "IQ4_NL": Layout(32, 18, _square(IQ4) ** 0.5, signed=True),
    "Q2_K": Layout(256, 84, _affine(range(8, 16), 4), d=80, low=82, low_factor=1.5, repair=_large_nibbles),
    "Q3_K": Layout(256, 110, (_K3 * _square(range(-4, 4))) ** 0.5, d=108),
    "Q4_K": Layout(256, 144, _affine(range(32, 64), 16), low=2, low_factor=7.5, repair=_large_scales),
    "Q5_K": Layout(256, 176, _affine(range(32, 64), 32), low=2, low_factor=15.5, repair=_large_scales),
    "Q6_K": Layout(256, 210, (_K6 * _square(range(-32, 32))) ** 0.5, d=208),
    "IQ4_XS": Layout(256, 136, (_K3 * _square(IQ4)) ** 0.5),
    "MXFP4": Layout(32, 17, _square(FP4) ** 0.5, power_of_two=True),
}


def block_bytes(kind: str, stream: Stream, rows: int, columns: int, deviation: float) -> Iterator[Bytes]:
    """The bytes of a [rows, columns] matrix, in pieces. Raises ValueError for an unknown type or columns that do not fit."""
    layout = LAYOUTS.get(kind)
    if layout is None or columns % layout.columns:
        raise ValueError(f"{columns} columns of {kind}: expected one of {', '.join(LAYOUTS)}, and a multiple of its block")
    count = rows * (columns // layout.columns)
    step = CHUNK_BYTES // layout.size // 8 * 8  # whole words, so that pieces of another size would hold the same bytes
    for begin in range(0, count, step):
        number = min(step, count - begin)
        blocks = stream.bytes(number * layout.size).reshape(number, layout.size)
        if layout.power_of_two:
            blocks[:, layout.d] = 128 + round(math.log2(deviation / layout.spread))
        else:
            _scale(blocks, layout, deviation)
        yield blocks.reshape(-1)


def _scale(blocks: Bytes, layout: Layout, deviation: float) -> None:
    """Sets d of every block: half to all of its largest size, from the random bytes that are in its place."""
    if layout.repair is not None:
        layout.repair(blocks)
    raw = np.ascontiguousarray(blocks[:, layout.d : layout.d + 2]).view("<u2")[:, 0]
    largest = deviation / layout.spread * (12 / 7) ** 0.5  # the mean square of 0.5..1 is 7 / 12
    d = (raw.astype(np.float32) + np.float32(65536)) * np.float32(largest / 131072)
    if layout.signed:
        np.negative(d, out=d, where=(raw & 1).astype(np.bool_))
    _store(blocks, layout.d, d)
    if layout.low is not None:
        _store(blocks, layout.low, d.astype("<f2").astype(np.float32) * np.float32(layout.low_factor))


def _store(blocks: Bytes, at: int, values: npt.NDArray[np.float32]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)
