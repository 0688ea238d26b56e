"""Tensor types of ggml: ids as they are written in files, and the block shapes that nomoat computes with."""

from __future__ import annotations

import math
from enum import IntEnum


class GgmlType(IntEnum):
    """Tensor types by their id in the file. 4, 5, 31-33 and 36-38 were retired by ggml."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


#: (elements, bytes) of one block of every type that nomoat can compute with.
BLOCK_SHAPE: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.MXFP4: (32, 17),
}


def stored_bytes(shape: tuple[int, ...], kind: GgmlType) -> int:
    """Bytes of a tensor whose rows are whole blocks."""
    values, size = BLOCK_SHAPE[kind]
    return math.prod(shape) // values * size


#: What to do about a file with weights of another type: repositories that offer one offer these too.
ADVICE = "get the Q4_K_M, Q3_K_M or Q2_K file of this model"
