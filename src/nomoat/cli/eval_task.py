"""`nomoat eval --task`: the options, the run and the report of benchmarks whose answers are programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from nomoat.evals.tasks.problem import Style
    from nomoat.evals.tasks.run import TaskResult

TASKS = ("humaneval", "mbpp")  # as nomoat.evals.tasks.TASKS, which is not imported for --help
F = TypeVar("F", bound=Callable[..., Any])


class Counts(click.ParamType[tuple[int, ...]]):
    """Whole numbers above 0, separated by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10_000 for part in parts):
            self.fail(f"{value!r}: expected whole numbers such as 1,10", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


_OPTIONS = (
    click.option(
        "--data", type=click.Path(path_type=Path), metavar="FILE", help="Task: its problems, instead of looking for them."
    ),
    click.option(
        "--prompt",
        type=click.Choice(("chat", "complete")),
        help="Task: ask, or let the model continue. [default: chat if the model has a template]",
    ),
    click.option("--samples", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Task: answers per problem."),
    click.option("--k", "ks", type=Counts(), default="1", show_default=True, help="Task: the k of pass@k, for example 1,10."),
    click.option(
        "--temperature", type=click.FloatRange(0, 100), help="Task: how freely to draw. [default: 0, or 0.8 with several answers]"
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Task: for temperatures above 0."),
    click.option(
        "--time-limit",
        type=click.IntRange(1, 3600),
        default=10,
        show_default=True,
        help="Task: processor seconds for an answer.",
    ),
)
_OF_TASKS = {"data", "prompt", "samples", "ks", "temperature", "seed", "time_limit"}
_NOT_OF_TASKS = {"metric", "layout", "mapping", "context", "stride"}


def task_options(command: F) -> F:
    """`--task` and the options that have a meaning with it only."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.option("--task", type=click.Choice(TASKS), help="Score on this benchmark: run the answers, instead of ROWS.")(
        command
    )


def check_task_options(ctx: click.Context) -> None:
    """Raises UsageError for an option that would have no effect."""
    refused = _OF_TASKS if ctx.params["task"] is None else _NOT_OF_TASKS
    for parameter in ctx.command.params:
        if parameter.name in refused and ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE:
            has = "needs --task" if ctx.params["task"] is None else f"has no meaning with --task {ctx.params['task']}"
            raise click.UsageError(f"{parameter.opts[0]} {has}")


def score_task(
    task: str,
    model: str,
    against: str | None,
    limit: int | None,
    max_tokens: int | None,
    batch: int,
    output: Path | None,
    show: int,
    larger_than_memory: bool,
    as_json: bool,
    markdown: bool,
    *,
    data: Path | None,
    prompt: Style | None,
    samples: int,
    ks: tuple[int, ...],
    temperature: float | None,
    seed: int,
    time_limit: int,
) -> None:
    """Everything that can be refused is looked at before a model is loaded."""
    from nomoat.cli.eval import open_all, progress_bar
    from nomoat.data.source import file_digest
    from nomoat.evals.run import sample_rows
    from nomoat.evals.tasks import TASKS as TABLE
    from nomoat.evals.tasks import run
    from nomoat.evals.tasks.sandbox import Limits, Sandbox

    if ks[-1] > samples:
        raise click.UsageError(f"--k {ks[-1]} needs at least as many answers to each problem: --samples {ks[-1]}")
    chosen = TABLE[task]
    sampling = run.sampling_for(chosen, samples=samples, temperature=temperature, seed=seed, max_tokens=max_tokens)
    sandbox = Sandbox(Limits(seconds=time_limit))
    path = run.find_data(chosen, data)
    digest, problems = file_digest(path), sample_rows(chosen.read(path), limit)
    results: dict[str, TaskResult] = {}
    for name, opened, stack in open_all([model] if against is None else [against, model], larger_than_memory):
        style: Style = prompt or ("complete" if opened.template is None else "chat")
        began = time.perf_counter()
        with progress_bar(f"{name}: answers") as progress:
            answers = run.answer(
                opened, chosen, problems, style, sampling, samples=samples, stack=stack, max_batch=batch, progress=progress
            )
        seconds = time.perf_counter() - began
        with progress_bar(f"{name}: tests") as progress:
            results[name] = run.grade(
                sandbox, chosen, problems, answers, style, sampling, answer_seconds=seconds, progress=progress
            )
    if output is not None:
        for name, result in results.items():
            run.write_attempts(output if name == model else output.with_suffix(f".against{output.suffix}"), result)
    _report(results, ks, model, against, {"file": str(path), "sha256": digest}, show, as_json, markdown)


def _report(
    results: dict[str, TaskResult],
    ks: tuple[int, ...],
    model: str,
    against: str | None,
    data: dict[str, str],
    show: int,
    as_json: bool,
    markdown: bool,
) -> None:
    from nomoat.evals import report
    from nomoat.evals.compare import compare

    comparison = None if against is None else compare(results[against].score(ks[0]), results[model].score(ks[0]))
    lines = [(name, result.score(k)) for name, result in results.items() for k in ks]
    if as_json:
        body: dict[str, Any] = {"data": data, "results": {name: result.summary(ks) for name, result in results.items()}}
        if comparison is not None:
            body["comparison"] = {key: value for key, value in comparison.summary().items() if key not in ("before", "after")}
        click.echo(json.dumps(body, ensure_ascii=False))
        return
    if markdown:
        click.echo(report.to_markdown(lines, comparison), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    report.print_results(console, lines)
    for name, result in results.items():
        console.print(report.plain(f"{name}: {outcomes_line(result)}"), soft_wrap=True)
    if comparison is not None:
        console.print(f"\n{report.verdict_line(comparison)}", soft_wrap=True)
        report.print_changes(console, comparison.changed[:show])
    else:
        _print_misses(console, results[model], show)


def outcomes_line(result: TaskResult) -> str:
    """`12 passed, 140 failed, 10 error, 2 timeout; tests took 14 s`."""
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in result.outcomes().items() if count)
    return f"{counts}; tests took {result.test_seconds:,.0f} s"


def _print_misses(console: Console, result: TaskResult, count: int) -> None:
    """The first problems whose first answer is not right, with the reason."""
    from rich.table import Table

    from nomoat.evals import report

    missed = [one for one in result.solved if one.attempts[0].outcome != "passed"]
    for one in missed[:count]:
        first = one.attempts[0]
        grid = Table.grid(padding=(0, 1, 0, 2))
        for label, text in (("asked", one.problem.question), ("got", first.answer), (first.outcome, first.detail)):
            grid.add_row(label, report.plain(report.shorten(text)))
        console.print(report.plain(f"\n{one.problem.id}"), style="bold")
        console.print(grid)
