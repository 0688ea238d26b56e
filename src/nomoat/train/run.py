"""A whole training job: inspect, plan, score, train, score again, save.

`nomoat train` and `nomoat.train(...)` both come here. Everything that is said goes out as events (see `display.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nomoat import settings
from nomoat.adapters import store
from nomoat.errors import AdapterError, InputError, NotFoundError, printable
from nomoat.hub.fit import this_machine
from nomoat.train.checkpoint import Checkpoints
from nomoat.train.job import RESUMABLE, Job, TrainResult, logged, rss_bytes
from nomoat.train.loop import Report
from nomoat.train.plan import TrainOptions, check_resources, make_plan
from nomoat.train.prepare import Prepared, choose_metric, prepare

SCORE_ROWS = 200


def train(
    base: str,
    data: Path | str,
    *,
    name: str | None = None,
    test: Path | str | None = None,
    metric: str | None = None,
    score_rows: int = SCORE_ROWS,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    truncate: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    allow: frozenset[str] = frozenset(),
    larger_than_memory: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    confirm: Callable[[], bool] | None = None,
    report: Report | None = None,
    **options: Any,
) -> TrainResult:
    """Teaches `base` (a model name; adapters in it stay frozen underneath) the rows of `data`, and saves an adapter.

    `options` are the fields of TrainOptions. `metric` "none" scores nothing; None chooses by the answers. `score_rows` limits
    how many of the test (or held-out) rows are scored. `confirm` is asked once the plan is known. With `larger_than_memory` the
    weights need not fit: they are read from the disk as they are used.

    Raises InputError and its kinds for wrong options, data, names or checkpoints; ResourceError for what does not fit;
    NonFiniteError after three steps that could not be applied.
    """
    from nomoat.adapters.open import open_model

    chosen = TrainOptions(**options)
    name = store.check_name(default_name(data) if name is None else name)
    _check_target(name, overwrite=overwrite or dry_run, resume=resume)
    if not allow <= RESUMABLE:
        raise InputError(f"--allow {', '.join(sorted(allow))}: choose from {', '.join(sorted(RESUMABLE))}", code="E_LIMIT")
    for file in (Path(data), *(() if test is None else (Path(test),))):
        if not file.exists():  # said before a model is fetched
            raise NotFoundError(f"{printable(str(file))}: no such file")
    tell: Report = report or (lambda event: None)

    def note(text: str) -> None:
        tell({"event": "note", "text": text})

    model, stack = open_model(base, download=True, threads=threads, larger_than_memory=larger_than_memory, tell=note)
    prepared = prepare(
        model,
        Path(data),
        chosen,
        test=None if test is None else Path(test),
        map=map,
        format=format,
        skip_bad=skip_bad,
        truncate=truncate,
    )
    tell(_inspected(prepared))
    machine = this_machine(settings.data_dir(), threads or settings.threads())
    machine = replace(machine, available=machine.available + rss_bytes())  # what the model takes already is in the plan
    file_bytes = 0 if larger_than_memory else model_bytes(model.path)  # weights that are paged need no memory of their own
    plan = make_plan(chosen, model.spec, machine, **prepared.counts(), file_bytes=file_bytes)
    tell({"event": "plan", "text": plan.text(chosen), **plan.as_json()})
    check_resources(plan, chosen, machine)
    if dry_run or (confirm is not None and not confirm()):
        return TrainResult(name, None, plan)
    job = Job(base, name, model, stack, chosen, prepared, plan, tell, overwrite=overwrite, resume=resume, allow=allow)
    with logged(job):
        return job.run(_metric(metric, prepared), score_rows)


def _check_target(name: str, *, overwrite: bool, resume: bool) -> None:
    """Raises AdapterError E_DUP where the name is taken. A run killed between saving and tidying up may be resumed."""
    unfinished = resume and Checkpoints(settings.runs_dir() / name, {}).exists() is not None
    if store.folder(name).exists() and not (overwrite or unfinished):
        raise AdapterError(f"an adapter named {name} exists; choose another --name, or --overwrite it", code="E_DUP")


def default_name(data: Path | str) -> str:
    """`Support Tickets.jsonl` -> `support-tickets`."""
    return re.sub(r"[^a-z0-9]+", "-", Path(data).stem.lower()).strip("-")[:64] or "adapter"


def _metric(metric: str | None, prepared: Prepared) -> str | None:
    if metric == "none" or not prepared.score:
        return None
    return metric or choose_metric(prepared.score)


def _inspected(prepared: Prepared) -> dict[str, Any]:
    found = prepared.inspection
    return {
        "event": "inspected",
        "text": found.render(color=sys.stdout.isatty()),
        "format": found.log.format,
        "rows": found.log.rows,
        "used": len(found.examples),
        "dropped": dict(found.dropped),
        "duplicates": found.duplicates,
        "leaked": found.leaked,
        "tokens": found.tokens,
        "learned_tokens": found.learned_tokens,
        "warnings": found.warnings(),
    }


def model_bytes(path: Path) -> int:
    """Size of a model's weight files."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
