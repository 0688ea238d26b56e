"""One training run whose plan is accepted: from the first score to the saved package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nomoat import __version__, settings
from nomoat.adapters import store
from nomoat.adapters.package import Manifest, save_adapter
from nomoat.adapters.stack import parse_model_name
from nomoat.data.pack import Pack, batches
from nomoat.engine.stack import Adapter, Stack
from nomoat.errors import InputError, ResourceError
from nomoat.hub.lock import exclusive
from nomoat.train.checkpoint import Checkpoint, Checkpoints
from nomoat.train.interrupt import Interruption
from nomoat.train.loop import Batches, Lora, Progress, Report, Trainer
from nomoat.train.plan import Plan, TrainOptions, default_learning_rate
from nomoat.train.prepare import Prepared
from nomoat.train.probe import probe, probe_steps

if TYPE_CHECKING:
    from nomoat.engine.model import Model
    from nomoat.evals.run import Result

#: What may differ between a checkpoint and the run that goes on from it, if asked for by name. The result is then no
#: longer bit for bit that of one uninterrupted run.
RESUMABLE = frozenset({"version", "cpu"})


@dataclass(frozen=True)
class TrainResult:
    """`path`: the saved package, None if the run was interrupted (`interrupted`: the signal) or only planned."""

    name: str
    path: Path | None
    plan: Plan
    metric: str | None = None
    before: Result | None = None
    after: Result | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_rss_mb: float = 0.0
    interrupted: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": None if self.path is None else str(self.path),
            "metric": self.metric,
            "before": None if self.before is None else self.before.score,
            "after": None if self.after is None else self.after.score,
            "steps": self.plan.steps,
            "learning_rate": self.learning_rate,
            "validation_loss": self.validation_loss,
            "best_step": self.best_step,
            "train_seconds": round(self.train_seconds, 2),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "interrupted": self.interrupted,
        }


@dataclass(frozen=True)
class Trained:
    """What the loop leaves. `adapter` is None and `interrupted` the signal if it was stopped; `tokens` of this session."""

    adapter: Adapter | None
    progress: Progress
    rate: float | None
    tokens: int
    seconds: float
    interrupted: int | None


class Job:
    """One run whose plan is accepted: everything from the first score to the saved package."""

    def __init__(
        self,
        base: str,
        name: str,
        model: Model,
        stack: Stack | None,
        options: TrainOptions,
        prepared: Prepared,
        plan: Plan,
        report: Report,
        *,
        overwrite: bool,
        resume: bool,
        allow: frozenset[str],
    ) -> None:
        self.base, self.name, self.model, self.stack = base, name, model, stack
        self.options, self.prepared, self.plan = options, prepared, plan
        self.overwrite, self.resume, self.allow = overwrite, resume, allow
        self.folder = settings.runs_dir() / name
        self.checkpoints = Checkpoints(self.folder, self.identity())
        self.log: TextIO | None = None
        self._report = report
        self._began = time.monotonic()
        self._first_step: int | None = None

    def identity(self) -> dict[str, Any]:
        """Everything that the numbers of the run depend on."""
        from nomoat._native import level

        return {
            "base": self.model.fingerprint,
            "on": None if self.stack is None else self.stack.key,
            "data": self.prepared.digest(),
            "options": self.options.identity(),
            "version": __version__,
            "cpu": level(),
        }

    def report(self, event: dict[str, Any]) -> None:
        """Passes an event on, steps with memory and time left, and keeps it in the run's log."""
        if event["event"] in ("step", "skipped"):
            if self._first_step is None:
                self._first_step, self._began = event["step"] - 1, time.monotonic() - event["step_seconds"]
            done = event["step"] - self._first_step
            left = (time.monotonic() - self._began) / done * (event["steps"] - event["step"])
            event = event | {"eta_seconds": round(left, 1), "memory_mb": round(rss_bytes() / 2**20, 1)}
        self._report(event)
        if self.log is not None:
            self.log.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
            self.log.flush()

    def run(self, metric: str | None, score_rows: int) -> TrainResult:
        checkpoint = self._find_checkpoint()
        before = None if metric is None else self._score("before", metric, score_rows, self.stack)
        trained = self._train(checkpoint)
        result = TrainResult(
            self.name,
            None,
            self.plan,
            metric=metric,
            before=before,
            learning_rate=trained.rate,
            validation_loss=trained.progress.best_loss,
            best_step=trained.progress.best_step,
            train_seconds=trained.seconds,
            tokens_per_second=trained.tokens / max(trained.seconds, 1e-9),
            interrupted=trained.interrupted,
        )
        if trained.adapter is None:
            self.report({"event": "interrupted", "step": trained.progress.step, "steps": self.plan.steps})
            return replace(result, peak_rss_mb=peak_rss_bytes() / 2**20)
        stack = Stack(self.model.spec, [*(() if self.stack is None else self.stack.adapters), (trained.adapter, 1.0)])
        after = None if metric is None else self._score("after", metric, score_rows, stack)
        result = replace(result, after=after)
        target = store.folder(self.name)
        path = save_adapter(target, trained.adapter, self.model.spec, self.manifest(result), replace=True)
        self.checkpoints.clear()
        result = replace(result, path=path, peak_rss_mb=peak_rss_bytes() / 2**20)
        self.report({"event": "saved", **result.as_json()})
        return result

    def _find_checkpoint(self) -> Checkpoint | None:
        """Where to go on. Raises InputError E_DUP for an unfinished run that is neither resumed nor overwritten."""
        step = self.checkpoints.exists()
        if self.resume:
            checkpoint = self.checkpoints.latest(allow=self.allow)
            for fault in () if checkpoint is None else checkpoint.faults:
                self.report({"event": "note", "text": fault})
            if checkpoint is None:
                self.report({"event": "note", "text": f"no complete checkpoint of {self.name}: starting from the beginning"})
            return checkpoint
        if step is not None and not self.overwrite:
            raise InputError(
                f"the run {self.name} stopped at step {step:,}: add --resume to go on, or --overwrite to begin anew", code="E_DUP"
            )
        self.checkpoints.clear()
        return None

    def _train(self, checkpoint: Checkpoint | None) -> Trained:
        """From the first step, or from a checkpoint, to the end or to an interruption; gives all its memory back."""
        from nomoat.engine.lora import TrainableLora

        o = self.options
        lora = TrainableLora(self.model.spec, rank=o.rank, alpha=o.alpha, targets=o.targets, seed=o.seed, base=self.stack)
        validation = self.prepared.validation_packs(o)

        def epoch(number: int) -> list[list[Pack]]:
            return batches(self.prepared.train, o.batch_sequences, o.max_tokens, o.seed, number)

        began = time.monotonic()
        with Interruption() as interruption:
            trainer = Trainer(
                self.model,
                lora,
                o,
                peak_rate=0.0,
                steps=self.plan.steps,
                batches=epoch,
                validation=validation,
                base=self.stack,
                checkpoints=self.checkpoints,
                budget=self.plan.activation_bytes,
                report=self.report,
                interrupted=interruption,
            )
            if checkpoint is not None:
                trainer.restore(checkpoint)
                rate: float | None = trainer.peak_rate
                self.report({"event": "resumed", "step": checkpoint.step})
            else:
                rate = self._learning_rate(lora, epoch, validation, interruption)
            finished = False
            if rate is not None:
                trainer.peak_rate = rate
                finished = trainer.run()
            if finished:  # so that a kill while the result is being scored loses nothing
                trainer.checkpoint(final=True)
        adapter = lora.to_adapter() if finished else None
        seconds = time.monotonic() - began
        return Trained(adapter, trainer.progress, rate, trainer.tokens, seconds, None if finished else interruption.signal)

    def _learning_rate(self, lora: Lora, epoch: Batches, validation: Sequence[Pack], interruption: Interruption) -> float | None:
        """As asked; by probe where the run is long enough; else by the model's size. None: interrupted."""
        rate, reason = self.options.learning_rate, "as asked"
        steps = probe_steps(self.plan.steps)
        if rate is None and steps and validation:
            reason = "by probe"
            rate = probe(
                self.model,
                lora,
                self.options,
                steps=steps,
                batches=epoch,
                validation=validation,
                base=self.stack,
                budget=self.plan.activation_bytes,
                report=self.report,
                interrupted=interruption,
            )
        elif rate is None:
            rate, reason = default_learning_rate(self.model.spec), "usual for a model of this size"
        if rate is not None:
            self.report({"event": "learning_rate", "learning_rate": rate, "reason": reason})
        return rate

    def _score(self, when: str, metric: str, limit: int, stack: Stack | None) -> Result:
        from nomoat.evals.report import result_line
        from nomoat.evals.run import evaluate

        def progress(done: int, total: int) -> None:
            self._report({"event": "scoring", "when": when, "done": done, "total": total})

        result = evaluate(self.model, self.prepared.score, metric, stack=stack, limit=limit, progress=progress)
        self.report({"event": when, "text": result_line(result), **result.summary()})
        return result

    def manifest(self, result: TrainResult) -> Manifest:
        """nomoat.json but for what `save_adapter` adds. Holds no time and no path, so the same run gives the same bytes."""
        from nomoat._native import level

        found, base = self.prepared.inspection, parse_model_name(self.base)[0]
        named = {} if "/" in base else {"model": base}  # a path is of this machine alone
        beneath = zip(parse_model_name(self.base)[1], () if self.stack is None else self.stack.adapters, strict=True)
        scores = {key: [r.score, r.low, r.high] for key in ("before", "after") if (r := getattr(result, key)) is not None}
        template = self.model.template
        return {
            "base": self.model.fingerprint | named,
            "chat_template": None if template is None else template.source,
            "stop_ids": sorted(self.model.tokenizer.eos_ids),
            "recipe": self.options.identity() | {"objective": "sft", "learning_rate": result.learning_rate},
            "data": {
                "sha256": found.log.sha256,
                "rows": found.log.rows,
                "learned": len(self.prepared.train),
                "held_out": len(self.prepared.validation),
                "tokens": self.plan.tokens,
                "loss_tokens": self.plan.loss_tokens,
            },
            "engine": {"version": __version__, "cpu": level()},
            "evaluation": {"metric": result.metric, "rows": result.after.n, **scores} if result.after else {},
            "validation_loss": result.validation_loss,
            "licences": {"base": None, "data": None, "adapter": None},
            "parents": [
                {"name": Path(name).name, "weight": weight, "digest": adapter.digest} for (name, weight), (adapter, _) in beneath
            ],
        }


@contextmanager
def logged(job: Job) -> Iterator[None]:
    """One process a run, and its events kept in `events.jsonl`."""
    try:
        with exclusive(job.folder / "lock", f"training {job.name}", wait=0.0), _log_file(job.folder) as job.log:
            yield
    except ResourceError as error:
        if error.code != "E_LOCKED":
            raise
        message = f"another process is training {job.name}; wait for it, or choose another --name"
        raise InputError(message, code="E_LOCKED") from None


def _log_file(folder: Path) -> TextIO:
    return (folder / "events.jsonl").open("a", encoding="utf-8")


def rss_bytes() -> int:
    """Resident bytes of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
