"""Quantizing float32 rows for models that come as Hugging Face folders."""

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
