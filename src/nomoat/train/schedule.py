"""Learning rate by step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, kind: str) -> float:
    """Rate of step 0 .. steps-1: a linear rise over the fraction `warmup` of the steps, then `kind`.

    linear    falls in a straight line and would be 0 at `steps`
    cosine    half a cosine from peak to 0
    constant  stays at the peak
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    progress = (step - rising) / max(1, steps - rising)
    match kind:
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            return peak
