"""Rows of a matrix as GGUF bytes and as float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nomoat import _native
from nomoat.files.ggml import GgmlType, stored_bytes


def quantize_rows(weight: npt.NDArray[np.float32], format: GgmlType) -> npt.NDArray[np.uint8]:
    """GGUF bytes of a matrix [rows, cols] in `format`, flat; how codes and scales are found is in native/quant/search.h."""
    out = np.empty(stored_bytes(weight.shape, format), np.uint8)
    _native.quantize_rows(int(format), np.ascontiguousarray(weight, np.float32), out)
    return out


def dequantize_rows(raw: npt.NDArray[np.uint8], format: GgmlType, cols: int) -> npt.NDArray[np.float32]:
    """GGUF bytes of whole rows as float32 [rows, cols], the same values as the `gguf` package finds."""
    rows = raw.size // stored_bytes((cols,), format)
    packed = np.empty(_native.packed_bytes(int(format), rows, cols), np.uint8)
    _native.pack(int(format), rows, cols, raw.reshape(-1), packed)
    out = np.empty((rows, -(-cols // 32) * 32), np.float32)
    _native.read_rows(int(format), rows, cols, packed, np.arange(rows, dtype=np.int32), out)
    return np.ascontiguousarray(out[:, :cols])
