"""Rotary position embedding: the frequencies, with context-extension scalings folded in, and the two row orders of q and k."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nomoat.models.fields import Fields

FloatArray = npt.NDArray[np.float64]

#: Ranges that hold every published model; outside them a file is damaged.
BASE_RANGE = (1.0, 1e12)
FACTOR_RANGE = (1e-3, 1e6)


def frequencies(dim: int, base: float) -> FloatArray:
    """Angle per position of each pair: base^(-2 i / dim), float64 [dim / 2]."""
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def linear(inv_freq: FloatArray, factor: float) -> FloatArray:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions are divided by `factor`."""
    return inv_freq / factor


def llama3(inv_freq: FloatArray, *, factor: float, low: float, high: float, original_context: int) -> FloatArray:
    """The scaling of Llama 3.1 and later.

    A pair that turns more than `high` times within the original context stays, one that turns less than `low` times is
    slowed by `factor`, and between the two the frequency is blended linearly in the number of turns.
    """
    turns = original_context * inv_freq / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def from_config(rope: Fields, dim: int, base: float) -> FloatArray:
    """Frequencies for the `rope_scaling` / `rope_parameters` object of a Hugging Face config.

    `dynamic` changes nothing inside the trained context, which is where nomoat stays. Raises ModelError for other types.
    """
    plain = frequencies(dim, base)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind in ("default", "dynamic"):
        return plain
    if kind == "linear":
        return linear(plain, rope.number("factor", *FACTOR_RANGE))
    if kind == "llama3":
        low = rope.number("low_freq_factor", 0.0, 1e6)
        high = rope.number("high_freq_factor", 0.0, 1e6)
        if high <= low:
            raise rope.fail("high_freq_factor", high, f"more than low_freq_factor, which is {low:g}", "E_LIMIT")
        original = rope.integer("original_max_position_embeddings", 1, 1 << 26)
        return llama3(plain, factor=rope.number("factor", *FACTOR_RANGE), low=low, high=high, original_context=original)
    raise rope.fail("rope_type", kind, "default, linear, dynamic or llama3: no other scaling is supported yet", "E_ARCH")


def interleaved_rows(heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Row order that turns Hugging Face q/k weights into GGUF's: `gguf_rows = hf_rows[interleaved_rows(...)]`.

    Within a head, Hugging Face pairs rows (i, i + head_dim / 2); arch-`llama` GGUFs pair (2i, 2i + 1). The inverse is
    `np.argsort` of the result. An adapter's B of q and k has the same rows.
    """
    order = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return order.transpose(0, 2, 1).reshape(-1)
