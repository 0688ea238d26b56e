"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over a list of arrays, with the arithmetic in native code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nomoat.engine.stack import Float32


class AdamW:
    """Keeps the two moments of every parameter. `applied` counts updates, for the bias correction."""

    def __init__(self, parameters: Sequence[Float32], *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.parameters = parameters
        self.first = [np.zeros_like(parameter) for parameter in parameters]
        self.second = [np.zeros_like(parameter) for parameter in parameters]
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.applied = 0

    def norm(self, gradients: Sequence[Float32]) -> float:
        """Euclidean norm of all gradients together; NaN or infinity if any of them holds one."""
        from nomoat._native import sum_squares

        total = math.fsum(sum_squares(gradients))
        return math.sqrt(total) if total >= 0 else math.nan

    def update(self, gradients: Sequence[Float32], *, rate: float, scale: float) -> None:
        """One step in place with gradients multiplied by `scale` (clipping)."""
        from nomoat._native import adamw

        self.applied += 1
        for parameter, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            beta1, beta2 = self.betas
            adamw(parameter, gradient, first, second, rate, beta1, beta2, self.eps, self.weight_decay, self.applied, scale)
