"""Supervised fine-tuning: the weighted mean of the negative log-likelihood of the target tokens of one optimizer step.

    loss = -sum_t w_t logp_t / sum_t w_t        d loss / d logp_t = -w_t / sum_t w_t

The sum of weights is that of the whole step, so cutting a step into packs changes nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def loss(logp: Float32, weights: Float32, total_weight: float) -> float:
    """This pack's share of the loss, in nats per unit of weight. `logp`, `weights`: [n weighted rows]."""
    return -float(np.sum(weights.astype(np.float64) * logp)) / total_weight


def d_logp(weights: Float32, total_weight: float) -> Float32:
    """Derivative of the loss with respect to each log-probability, [n weighted rows]."""
    return (weights.astype(np.float64) / -total_weight).astype(np.float32)
