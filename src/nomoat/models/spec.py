"""What an architecture file produces: everything the engine needs to know about a model, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

#: The linears of one layer that an adapter may target, in the order used everywhere.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) with its scaling already folded into the frequencies.

    `inv_freq[i]` is the angle per position of pair i, float32 [dim / 2]. `interleaved` pairs (2i, 2i+1), as GGUF files of
    architecture `llama` store q and k; otherwise pairs are (i, i + dim / 2), as Hugging Face does.
    """

    dim: int
    interleaved: bool
    inv_freq: npt.NDArray[np.float32]
    magnitude: float = 1.0  # cos and sin are multiplied by it (yarn, longrope)


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions: D = width, H = heads, K = kv_heads, V = vocab, F = ffn, L = layers."""

    architecture: str
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    rope: RopeSpec
    tied_head: bool
    activation: Literal["silu"] = "silu"
    #: engine name -> tensor name in the source file, for example "blk.0.q" -> "blk.0.attn_q.weight"
    tensors: dict[str, str] = field(default_factory=dict)
    #: sentences for the user: unused tensors, a context that was shortened
    notes: tuple[str, ...] = ()

    def linear_shape(self, target: str) -> tuple[int, int]:
        """(rows N, columns K) of a target's weight: y[N] = W[N, K] x[K]."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q": (q, self.width),
            "k": (kv, self.width),
            "v": (kv, self.width),
            "o": (self.width, q),
            "gate": (self.ffn, self.width),
            "up": (self.ffn, self.width),
            "down": (self.width, self.ffn),
        }
        return shapes[target]

    def tensor_shape(self, engine_name: str) -> tuple[int, ...]:
        """Shape of a weight by engine name ("embed", "head", "blk.3.q", ...), rows first; norms are [D]."""
        if engine_name in ("embed", "head"):
            return (self.vocab, self.width)
        target = engine_name.rpartition(".")[2]
        return self.linear_shape(target) if target in TARGETS else (self.width,)

    def parameters(self) -> int:
        """Weights in all matrices (norms left out): what decides size and speed."""
        per_layer = sum(n * k for n, k in map(self.linear_shape, TARGETS))
        return self.layers * per_layer + (1 if self.tied_head else 2) * self.vocab * self.width
