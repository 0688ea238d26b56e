"""Quantizing float32 rows for models that come as Hugging Face folders."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nomoat import _native
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType


def quantize_rows(weight: npt.NDArray[np.float32], format: GgmlType) -> npt.NDArray[np.uint8]:
    """GGUF bytes of a matrix [rows, cols] in `format`, flat; how codes and scales are found is in native/quant/search.h."""
    values, size = BLOCK_SHAPE[format]
    out = np.empty(math.prod(weight.shape) // values * size, np.uint8)
    _native.quantize_rows(int(format), np.ascontiguousarray(weight, np.float32), out)
    return out
