"""Learning rate by trial: short runs from the same start on the same rows, judged by validation loss.

Each candidate is a whole small run with its own warm-up and decay. All together cost at most a tenth of the training that
follows, so only long runs probe; `probe_steps` says how long each candidate may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nomoat.engine.stack import Stack
from nomoat.errors import NonFiniteError
from nomoat.train.loop import Batches, Lora, Report, TrainableModel, Trainer, validation_loss
from nomoat.train.plan import TrainOptions

if TYPE_CHECKING:
    from nomoat.data.pack import Pack

CANDIDATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
#: Part of the run that the candidates' steps may cost; with their validation the whole stays under a tenth.
SHARE = 0.08
SHORTEST = 12  # steps; a shorter run says more about warm-up than about the rate
VALIDATION_PACKS = 2
#: Of candidates this close in loss to the best, the smallest rate wins: a short run flatters large rates.
TIE = 0.01


def probe_steps(steps: int) -> int:
    """Steps of each candidate for a run of `steps`; 0: the run is too short to pay for a probe."""
    each = math.floor(SHARE * steps / len(CANDIDATES))
    return each if each >= SHORTEST else 0


def probe(
    model: TrainableModel,
    lora: Lora,
    options: TrainOptions,
    *,
    steps: int,
    batches: Batches,
    validation: Sequence[Pack],
    base: Stack | None = None,
    budget: int | None = None,
    report: Report | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """Tries every candidate for `steps` steps and returns the best rate; None if interrupted. `lora` is left as it was."""
    start = [parameter.copy() for parameter in lora.parameters]
    losses: dict[float, float] = {}
    for rate in CANDIDATES:
        trainer = Trainer(
            model, lora, options, peak_rate=rate, steps=steps, batches=batches, base=base, budget=budget, interrupted=interrupted
        )
        try:
            done = trainer.run()
            losses[rate] = validation_loss(model, lora, validation[:VALIDATION_PACKS], base) if done else math.nan
        except NonFiniteError:
            done, losses[rate] = True, math.inf
        finally:
            for parameter, initial in zip(lora.parameters, start, strict=True):
                parameter[...] = initial
        if not done:
            return None
        if report is not None:
            shown = losses[rate] if math.isfinite(losses[rate]) else None
            report({"event": "probe", "learning_rate": rate, "steps": steps, "loss": shown})
    return choose(losses)


def choose(losses: dict[float, float]) -> float:
    """The smallest rate whose loss is within `TIE` of the best. Raises NonFiniteError where none is finite."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise NonFiniteError("no learning rate gives a finite loss; look at the data, or at the model")
    best = min(finite.values())
    return min(rate for rate, loss in finite.items() if loss <= best + TIE * abs(best))
