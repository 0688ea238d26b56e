"""What config.json says layer by layer: windows, positions, experts."""

from __future__ import annotations

from collections.abc import Callable

from nomoat.models.arch import Draft
from nomoat.models.fields import MAX_CONTEXT, MAX_EXPERTS, Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def window(keys: Fields) -> int:
    """`sliding_window`, 0 where there is none. A row sees so many keys, its own included."""
    return keys.integer("sliding_window", 1, MAX_CONTEXT) if keys.has("sliding_window") else 0


def window_everywhere(keys: Fields, model: Draft) -> None:
    """Every layer has the window."""
    model.windows = [window(keys)] * model.layers


def windows_by_type(keys: Fields, model: Draft, slides: Callable[[int], bool]) -> None:
    """`layer_types` says which layers have the window; where it is left out, `slides(layer)` does."""
    if keys.has("layer_types"):
        types = keys.choices("layer_types", (FULL, SLIDING), model.layers)
        sliding = [kind == SLIDING for kind in types]
    else:
        sliding = [slides(layer) for layer in range(model.layers)]
    size = window(keys) if any(sliding) else 0
    if any(sliding) and not size:
        raise keys.fail("sliding_window", None, "the window of the sliding layers", "E_ARCH")
    model.windows = [size if slide else 0 for slide in sliding]


def experts(keys: Fields, model: Draft, count_key: str, sparse: Callable[[int], bool] = lambda layer: True) -> None:
    """Experts in the layers that are `sparse`, and how many of them a token uses."""
    count = keys.integer(count_key, 2, MAX_EXPERTS)
    model.experts = [count if sparse(layer) else 0 for layer in range(model.layers)]
    model.fields["experts_used"] = keys.integer("num_experts_per_tok", 1, count)
