"""Training: plan, learning-rate probe, loop, checkpoints.

`nomoat.train` is both this package and the public function: `nomoat.train("smollm2:135m", "rows.jsonl", name="tickets")`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomoat.train.job import TrainResult


class _CallableModule(ModuleType):
    """Python sets the attribute `train` of `nomoat` to this module when anything below it is imported; so it can be called."""

    def __call__(self, base: str, data: str, **options: Any) -> TrainResult:
        from nomoat.train.run import train

        return train(base, data, **options)


sys.modules[__name__].__class__ = _CallableModule
