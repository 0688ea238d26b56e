"""The training loop. Its result depends on options, data and base alone: not on time, threads, or where it was interrupted.

One optimizer step: gradients of all packs of the batch are added up, their norm is clipped, AdamW moves the parameters.
A step whose loss or gradient is not finite, or whose gradient is a hundred times the usual, changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nomoat.engine.stack import Adapter, Float32, Stack
from nomoat.errors import NonFiniteError, ResourceError
from nomoat.models.spec import ModelSpec
from nomoat.train.objectives import sft
from nomoat.train.optimizer import AdamW
from nomoat.train.plan import TrainOptions
from nomoat.train.schedule import learning_rate

if TYPE_CHECKING:
    from nomoat.data.pack import Pack
    from nomoat.train.checkpoint import Checkpoint, Checkpoints

#: epoch -> the packs of each optimizer step, in order
Batches = Callable[[int], Sequence[Sequence["Pack"]]]
#: Receives events: {"event": "step" | "validation" | "checkpoint" | ..., ...}, JSON values only.
Report = Callable[[dict[str, Any]], None]

MAX_FAILURES = 3  # steps in a row that were not applied
SPIKE = 100.0  # a gradient this many times the usual is not applied


class TrainableModel(Protocol):
    """What the loop asks of a model (`nomoat.engine.model.Model`)."""

    spec: ModelSpec

    def loss_gradients(
        self, pack: Pack, lora: Any, d_logp: Float32, *, precision: str = ..., budget: int | None = ...
    ) -> Float32: ...

    def logprobs(self, pack: Pack, *, stack: Stack | None = ..., precision: str = ...) -> Float32: ...


class Lora(Protocol):
    """What the loop asks of the trained adapter (`nomoat.engine.lora.TrainableLora`)."""

    @property
    def parameters(self) -> list[Float32]: ...
    @property
    def gradients(self) -> list[Float32]: ...
    @property
    def names(self) -> list[str]: ...
    def zero_grad(self) -> None: ...
    def to_adapter(self) -> Adapter: ...


@dataclass
class Progress:
    """Counters and history, as saved in checkpoints. `losses`: (steps done, validation loss) pairs."""

    step: int = 0  # optimizer steps done, applied or not
    failures: int = 0  # steps in a row that were not applied
    skipped: int = 0  # steps that were not applied, in all
    usual_norm: float = 0.0  # running mean of the gradient norm
    best_step: int | None = None
    best_loss: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """One run. `steps` in all; `batches(epoch)` gives the packs of each step; `base` is the frozen stack underneath."""

    def __init__(
        self,
        model: TrainableModel,
        lora: Lora,
        options: TrainOptions,
        *,
        peak_rate: float,
        steps: int,
        batches: Batches,
        validation: Sequence[Pack] = (),
        base: Stack | None = None,
        checkpoints: Checkpoints | None = None,
        budget: int | None = None,
        report: Report | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.lora, self.options, self.base = model, lora, options, base
        self.peak_rate, self.steps, self.budget = peak_rate, steps, budget
        self.batches, self.validation = batches, validation
        self.checkpoints, self.report, self.interrupted = checkpoints, report or (lambda event: None), interrupted
        self.optimizer = AdamW(
            lora.parameters, betas=(options.beta1, options.beta2), eps=options.eps, weight_decay=options.weight_decay
        )
        self.progress = Progress()
        self.best: list[Float32] | None = None
        self._epoch: tuple[int, Sequence[Sequence[Pack]]] | None = None
        self._began = self._saved = time.monotonic()
        self.tokens = 0

    def run(self) -> bool:
        """Trains to the end, or until `interrupted()`; then a checkpoint is written and False returned.

        At the end the adapter holds the parameters with the best validation loss (the last ones without validation).
        Raises NonFiniteError after three steps in a row that could not be applied.
        """
        self._began = self._saved = time.monotonic()
        while self.progress.step < self.steps:
            if self.interrupted():
                self.checkpoint(final=True)
                return False
            self._one_step()
            self._maybe_checkpoint()
        if self.best is not None:
            for parameter, best in zip(self.lora.parameters, self.best, strict=True):
                parameter[...] = best
        return True

    def _one_step(self) -> None:
        progress, began = self.progress, time.monotonic()
        packs = self._packs(progress.step)
        rate = learning_rate(
            progress.step, self.steps, peak=self.peak_rate, warmup=self.options.warmup, kind=self.options.schedule
        )
        try:
            loss = self.gradients(packs)
            norm = self.optimizer.norm(self.lora.gradients)
        except NonFiniteError:  # the model found a log-probability that is not a number
            loss = norm = math.nan
        applied = self._apply(loss, norm, rate)
        progress.step += 1
        self.tokens += sum(pack.rows for pack in packs)
        elapsed = time.monotonic() - self._began
        self.report(
            {
                "event": "step" if applied else "skipped",
                "step": progress.step,
                "steps": self.steps,
                "loss": _finite(loss),
                "gradient_norm": _finite(norm),
                "learning_rate": rate,
                "tokens": self.tokens,
                "tokens_per_second": self.tokens / max(elapsed, 1e-9),
                "step_seconds": time.monotonic() - began,
            }
        )
        if progress.failures >= MAX_FAILURES:
            raise NonFiniteError(
                f"the loss or its gradient was NaN, infinite or exploding in {MAX_FAILURES} steps in a row "
                f"(the last: loss {loss}, gradient norm {norm}, step {progress.step}); nothing of them was applied. "
                "Use a smaller --lr, or look at the rows of these steps"
            )
        every = max(1, math.ceil(self.steps / self.options.evaluations))
        if self.validation and (progress.step % every == 0 or progress.step == self.steps):
            self._validate()

    def gradients(self, packs: Sequence[Pack]) -> float:
        """Adds up the gradients of one step; returns its loss, in nats per unit of weight."""
        self.lora.zero_grad()
        total = math.fsum(float(np.sum(pack.weights, dtype=np.float64)) for pack in packs)
        loss = 0.0
        for pack in packs:
            weights = pack.weights[pack.weights != 0]
            if len(weights):
                d_logp = sft.d_logp(weights, total)
                logp = self.model.loss_gradients(pack, self.lora, d_logp, precision=self.options.precision, budget=self.budget)
                loss += sft.loss(logp, weights, total)
        return loss

    def _apply(self, loss: float, norm: float, rate: float) -> bool:
        progress = self.progress
        usual = max(progress.usual_norm, self.options.clip)
        if not math.isfinite(loss) or not norm <= SPIKE * usual or math.isinf(norm):
            progress.failures += 1
            progress.skipped += 1
            return False
        progress.failures = 0
        progress.usual_norm = norm if self.optimizer.applied == 0 else 0.9 * progress.usual_norm + 0.1 * norm
        scale = min(1.0, self.options.clip / norm) if norm > 0 else 1.0
        self.optimizer.update(self.lora.gradients, rate=rate, scale=scale)
        return True

    def _packs(self, step: int) -> Sequence[Pack]:
        if self._epoch is None:
            self._epoch = (0, self.batches(0))
        epoch, position = divmod(step, len(self._epoch[1]))
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self.batches(epoch))
        return self._epoch[1][position]

    def _validate(self) -> None:
        progress = self.progress
        loss = validation_loss(self.model, self.lora, self.validation, self.base)
        self.report({"event": "validation", "step": progress.step, "steps": self.steps, "loss": _finite(loss)})
        if not math.isfinite(loss):
            return
        progress.losses.append((progress.step, loss))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_step, progress.best_loss = progress.step, loss
            self.best = [parameter.copy() for parameter in self.lora.parameters]

    def _maybe_checkpoint(self) -> None:
        if self.progress.step < self.steps and time.monotonic() - self._saved >= self.options.checkpoint_seconds:
            self.checkpoint()

    def checkpoint(self, *, final: bool = False) -> None:
        """Saves the state. A full disk is reported and tried again later, unless `final`, when it is raised."""
        if self.checkpoints is None or self.checkpoints.saved_step == self.progress.step:
            return
        self._saved = time.monotonic()
        try:
            self.checkpoints.save(self.progress.step, self.arrays(), self.state())
        except (OSError, ResourceError) as error:
            if final:
                raise
            self.report({"event": "checkpoint_failed", "step": self.progress.step, "error": str(error)})
            return
        self.report({"event": "checkpoint", "step": self.progress.step})

    def arrays(self) -> dict[str, Float32]:
        """Everything in arrays that the rest of the run depends on."""
        groups = {"parameter": self.lora.parameters, "first": self.optimizer.first, "second": self.optimizer.second}
        if self.best is not None:
            groups["best"] = self.best
        names = self.lora.names
        return {f"{kind}.{name}": array for kind, group in groups.items() for name, array in zip(names, group, strict=True)}

    def state(self) -> dict[str, Any]:
        """Everything else that the rest of the run depends on."""
        return asdict(self.progress) | {"applied": self.optimizer.applied, "peak_rate": self.peak_rate}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues exactly where a checkpoint of the same run was written. Takes the arrays out of it: memory is short."""
        state = dict(checkpoint.state)
        self.optimizer.applied, self.peak_rate = state.pop("applied"), state.pop("peak_rate")
        self.progress = Progress(**state)
        self.progress.losses = [(step, loss) for step, loss in self.progress.losses]
        if self.progress.best_step is not None:
            self.best = [np.empty_like(parameter) for parameter in self.lora.parameters]
        _move_into(self.arrays(), checkpoint.arrays)


def _move_into(targets: Mapping[str, Float32], sources: dict[str, Float32]) -> None:
    for name, target in targets.items():
        target[...] = sources.pop(name)


def validation_loss(model: TrainableModel, lora: Lora, packs: Sequence[Pack], base: Stack | None) -> float:
    """Mean negative log-likelihood of the weighted tokens, in nats, at the precision that serves."""
    beneath = () if base is None else base.adapters
    stack = Stack(model.spec, [*beneath, (lora.to_adapter(), 1.0)])
    total = loss = 0.0
    for pack in packs:
        weights = pack.weights[pack.weights != 0].astype(np.float64)
        if len(weights):
            loss -= float(np.sum(weights * model.logprobs(pack, stack=stack)))
            total += float(np.sum(weights))
    return loss / total if total else math.nan


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
