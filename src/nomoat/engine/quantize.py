"""Quantizing float32 rows for models that come as Hugging Face folders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nomoat.files.ggml import GgmlType


def quantize_rows(weight: npt.NDArray[np.float32], format: GgmlType) -> npt.NDArray[np.uint8]:
    """GGUF bytes of a matrix [rows, cols] in `format` (Q8_0 or Q4_K), flat."""
    if format is GgmlType.Q4_K:
        return _q4_k(weight)
    import gguf.quants
    from gguf import GGMLQuantizationType

    packed = gguf.quants.quantize(weight, GGMLQuantizationType(int(format)))
    return np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1)


def _q4_k(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Q4_K by least squares: layout in native/quant/q4_k.h.

    Each group of 32 gets a scale and a minimum from its range, refined three times by solving for (scale, minimum) with the
    codes fixed and choosing the codes anew; then both are rounded to 6 bits against the largest of the 256 columns.
    """
    out = np.empty((weight.size // 256, 144), np.uint8)
    blocks = weight.reshape(-1, 8, 32)
    for begin in range(0, len(blocks), 4096):  # bounds the temporaries to some 30 MB
        x = blocks[begin : begin + 4096].astype(np.float32)
        low, high = np.minimum(x.min(-1), 0), x.max(-1)
        scale = (high - low) / 15
        for _ in range(3):
            safe = np.where(scale > 0, scale, 1)[..., None]
            codes = np.clip(np.rint((x - low[..., None]) / safe), 0, 15)
            mean_code, mean_x = codes.mean(-1), x.mean(-1)
            spread = ((codes - mean_code[..., None]) ** 2).sum(-1)
            product = ((codes - mean_code[..., None]) * (x - mean_x[..., None])).sum(-1)
            fitted = np.where(spread > 0, product / np.where(spread > 0, spread, 1), scale)
            usable = fitted > 0
            scale = np.where(usable, fitted, scale)
            low = np.where(usable, np.minimum(mean_x - scale * mean_code, 0), low)
        d, dmin = scale.max(-1) / 63, (-low).max(-1) / 63
        d16, dmin16 = d.astype("<f2"), dmin.astype("<f2")
        d32, dmin32 = d16.astype(np.float32), dmin16.astype(np.float32)
        s = _six_bits(scale, d32)
        m = _six_bits(-low, dmin32)
        step = d32[:, None] * s
        base = dmin32[:, None] * m
        codes = np.clip(np.rint((x + base[..., None]) / np.where(step > 0, step, 1)[..., None]), 0, 15)
        q = np.where(step[..., None] > 0, codes, 0).astype(np.uint8)
        to = out[begin : begin + 4096]
        to[:, 0:2] = d16.reshape(-1, 1).view(np.uint8)
        to[:, 2:4] = dmin16.reshape(-1, 1).view(np.uint8)
        to[:, 4:8] = s[:, :4] | (s[:, 4:] >> 4) << 6
        to[:, 8:12] = m[:, :4] | (m[:, 4:] >> 4) << 6
        to[:, 12:16] = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
        to[:, 16:] = (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)
    return out.reshape(-1)


def _six_bits(values: npt.NDArray[np.float32], unit: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    safe = np.where(unit > 0, unit, 1)[:, None]
    return np.where(unit[:, None] > 0, np.clip(np.rint(values / safe), 0, 63), 0).astype(np.uint8)
