"""`nomoat eval`: score a model on rows of your own or on a benchmark, compare two, or measure perplexity."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomoat.cli.eval_task import check_task_options, score_task, task_options
from nomoat.cli.memory import larger_than_memory, say
from nomoat.errors import InputError, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from nomoat.data.readers import Row
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack
    from nomoat.evals.run import Result

METRICS = (
    "exact",
    "json",
    "contains",
    "numeric",
    "rouge",
    "loss",
)  # as nomoat.evals.metrics.METRICS, which is not imported for --help


@click.command("eval")
@click.argument("model")
@click.argument("rows", required=False, type=click.Path(path_type=Path))
@click.option("--metric", type=click.Choice(METRICS), default="exact", show_default=True, help="How an answer is graded.")
@click.option("--against", metavar="MODEL2", help="Score this model on the same rows too, and say whether MODEL is better.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only N rows, drawn at random with a fixed seed.")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Longest answer. [default: follows from the longest reference; 512 for a task]"
)
@click.option("--batch", type=click.IntRange(1, 256), default=16, show_default=True, help="Rows answered at once.")
@click.option("--format", "layout", help="Layout of ROWS, instead of detecting it.")
@click.option(
    "--map", "mapping", multiple=True, metavar="FIELD=COLUMN", help="Name the columns of ROWS, for example prompt=question."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write every row with its answer and score to this .jsonl file.")
@click.option("--show", type=click.IntRange(0), default=3, show_default=True, help="Rows to show: wrong ones, or changed ones.")
@larger_than_memory
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option(
    "--perplexity", "text", type=click.Path(path_type=Path), metavar="FILE", help="Perplexity of a text, instead of ROWS."
)
@click.option("--context", type=click.IntRange(4), default=512, show_default=True, help="Perplexity: tokens in a window.")
@click.option("--stride", type=click.IntRange(1), help="Perplexity: windows every N tokens; every token counts once.")
@task_options
def command(
    model: str,
    rows: Path | None,
    metric: str,
    against: str | None,
    limit: int | None,
    max_tokens: int | None,
    batch: int,
    layout: str | None,
    mapping: tuple[str, ...],
    output: Path | None,
    show: int,
    larger_than_memory: bool,
    as_json: bool,
    markdown: bool,
    text: Path | None,
    context: int,
    stride: int | None,
    task: str | None,
    **of_task: Any,
) -> None:
    """Score MODEL on ROWS, a file of examples that carry their answers, or on a benchmark of programming problems.

    The last assistant message of a row is the reference; the model gets what comes before it.

    \b
    exact     same text, whitespace aside        contains  the reference occurs in the answer
    json      same JSON value                    numeric   same last number
    rouge     ROUGE-L F1, for free text          loss      nats per token of the reference

    \b
    nomoat eval smollm2:135m+tickets test.jsonl --metric json --against smollm2:135m
    nomoat eval smollm2:135m --task humaneval
    nomoat eval smollm2:135m --perplexity wiki.txt
    """
    if sum(given is not None for given in (rows, task, text)) != 1:
        raise click.UsageError("give one of ROWS, --task NAME and --perplexity FILE")
    check_task_options(click.get_current_context())
    if task is not None:
        score_task(task, model, against, limit, max_tokens, batch, output, show, larger_than_memory, as_json, markdown, **of_task)
        return
    if text is not None:
        _perplexity(model, text, context, stride, limit, larger_than_memory, as_json)
        return
    assert rows is not None
    from nomoat.data.readers import read_examples
    from nomoat.evals.compare import compare
    from nomoat.evals.run import sample_rows

    examples = read_examples(rows, map=_pairs(mapping), format=layout)
    chosen = sample_rows(examples, limit)
    if max_tokens is not None and metric == "loss":
        raise click.UsageError("--max-tokens has no meaning for --metric loss: nothing is generated")
    results: dict[str, Result] = {}
    for name, opened, stack in open_all([model] if against is None else [against, model], larger_than_memory):
        results[name] = _evaluate(name, opened, stack, chosen, metric, max_tokens, batch)
    if output is not None:
        _write(output, results, model)
    comparison = None if against is None else compare(results[against], results[model])
    _report(results, comparison, show, as_json, markdown)


def open_all(names: list[str], larger_than_memory: bool) -> Iterator[tuple[str, Model, Stack | None]]:
    """Each model in turn; one that shares its base with the one before is not loaded again."""
    from nomoat.adapters.open import open_model, stack_for
    from nomoat.adapters.stack import parse_model_name
    from nomoat.cli.fetch import fetch_missing

    if len(set(names)) < len(names):
        raise InputError(f"{printable(names[0])} against itself: name two different models")
    for name in names:
        fetch_missing(name)
    base, model = None, None
    for name in names:
        if model is not None and parse_model_name(name)[0] == base:
            yield name, model, stack_for(model, name)
            continue
        base = parse_model_name(name)[0]
        model, stack = open_model(name, larger_than_memory=larger_than_memory, tell=say)
        yield name, model, stack


def _evaluate(
    name: str, model: Model, stack: Stack | None, rows: list[Row], metric: str, max_tokens: int | None, batch: int
) -> Result:
    from nomoat.evals.metrics import METRICS as TABLE
    from nomoat.evals.run import evaluate, greedy_for

    sampling = None
    if TABLE[metric].grade is not None and max_tokens is not None:
        sampling = replace(greedy_for(model, rows, metric), max_tokens=max_tokens)
    with progress_bar(name) as progress:
        return evaluate(model, rows, metric, stack=stack, sampling=sampling, max_batch=batch, progress=progress)


def _write(output: Path, results: dict[str, Result], model: str) -> None:
    """FILE gets MODEL's rows; those of the model it is compared with go to FILE.against.jsonl."""
    from nomoat.evals.run import write_records

    for name, result in results.items():
        write_records(output if name == model else output.with_suffix(f".against{output.suffix}"), result.records)


def _report(results: dict[str, Result], comparison: Any, show: int, as_json: bool, markdown: bool) -> None:
    from nomoat.evals import report

    if as_json:
        click.echo(report.to_json(results, comparison))
        return
    if markdown:
        click.echo(report.to_markdown(results.items(), comparison), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    report.print_results(console, results.items())
    if comparison is not None:
        console.print(f"\n{report.verdict_line(comparison)}", soft_wrap=True)
        report.print_changes(console, comparison.changed[:show])
    else:
        report.print_misses(console, next(iter(results.values())), show)


def _perplexity(
    model: str, file: Path, context: int, stride: int | None, limit: int | None, larger_than_memory: bool, as_json: bool
) -> None:
    from dataclasses import asdict

    from nomoat.adapters.open import open_model
    from nomoat.cli.fetch import fetch_missing
    from nomoat.evals.perplexity import perplexity
    from nomoat.evals.report import perplexity_line

    try:
        text = file.read_bytes().decode()
    except OSError as fault:
        raise InputError(f"cannot read {printable(str(file))}: {fault.strerror}", code="E_PATH") from None
    except UnicodeDecodeError as fault:
        raise InputError(f"{printable(str(file))} is not UTF-8 text (byte {fault.start:,})", code="E_UTF8") from None
    fetch_missing(model)
    opened, stack = open_model(model, larger_than_memory=larger_than_memory, tell=say)
    convention = "llama.cpp" if stride is None else "strided"
    with progress_bar(model) as progress:
        result = perplexity(
            opened, text, context=context, convention=convention, stride=stride, limit=limit, stack=stack, progress=progress
        )
    click.echo(json.dumps({"model": model} | asdict(result)) if as_json else perplexity_line(result))


def _pairs(mapping: tuple[str, ...]) -> dict[str, str] | None:
    made = {}
    for item in mapping:
        field, equals, column = item.partition("=")
        if not (field and equals and column):
            raise click.UsageError(f"--map {item}: expected FIELD=COLUMN, for example prompt=question")
        made[field] = column
    return made or None


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left on a terminal's stderr; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(printable(title)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
