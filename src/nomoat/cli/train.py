"""`nomoat train`: teach a model your task."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomoat.cli.memory import larger_than_memory
from nomoat.errors import printable

if TYPE_CHECKING:
    from nomoat.train.job import TrainResult

METRICS = ("exact", "json", "contains", "numeric", "rouge", "loss", "none")  # as nomoat.evals.metrics.METRICS, and none


@click.command("train")
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the adapter. [default: that of the data file]")
@click.option("--test", type=click.Path(path_type=Path), help="Rows to score before and after. [default: held-out rows of DATA]")
@click.option("--metric", type=click.Choice(METRICS), help="How answers are graded. [default: follows from the answers]")
@click.option("--score-rows", type=click.IntRange(1), default=200, show_default=True, help="At most so many rows are scored.")
@click.option("--epochs", type=int, default=1, show_default=True, help="How often every row is learned.")
@click.option("--max-steps", type=int, help="Stop after so many optimizer steps.")
@click.option("--batch", "batch_sequences", type=int, default=16, show_default=True, help="Rows of one optimizer step.")
@click.option("--lr", "learning_rate", type=float, help="Peak learning rate. [default: by probe, or by size of the model]")
@click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), default="linear", show_default=True)
@click.option("--warmup", type=float, default=0.03, show_default=True, help="Part of the steps with rising learning rate.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--rank", type=int, default=16, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=float, default=32.0, show_default=True, help="Strength: the adapter is multiplied by alpha / rank.")
@click.option("--targets", help="Comma-separated part of q,k,v,o,gate,up,down,experts. [default: all but experts]")
@click.option("--context", type=int, help="Longest row in tokens. [default: the model's, at most 2,048]")
@click.option("--max-tokens", type=int, default=768, show_default=True, help="Tokens computed at once; decides memory.")
@click.option("--validation", type=float, default=0.05, show_default=True, help="Part of the rows to hold out; 0 for none.")
@click.option("--evaluations", type=int, default=4, show_default=True, help="How often the validation loss is measured.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN", help="Name the columns of DATA, as prompt=question.")
@click.option("--format", "layout", help="Layout of DATA, instead of detecting it.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read, instead of stopping.")
@click.option("--truncate", is_flag=True, help="Cut rows that are too long, instead of leaving them out.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; the result is that of an uninterrupted run.")
@click.option("--allow", multiple=True, metavar="NAME", help="With --resume: may differ from before (version, cpu).")
@click.option("--overwrite", is_flag=True, help="Replace an adapter or an unfinished run of this name.")
@larger_than_memory
@click.option("--dry-run", is_flag=True, help="Inspect and plan only.")
@click.option("--yes", is_flag=True, help="Do not ask before starting.")
@click.option("--json", "as_json", is_flag=True, help="Print events as lines of JSON.")
def command(
    base: str,
    data: Path,
    targets: str | None,
    mapping: tuple[str, ...],
    layout: str | None,
    allow: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Teach BASE the rows of DATA, and save what was learned as an adapter.

    DATA: OpenAI messages, prompt/completion, ShareGPT, Alpaca (JSON lines), CSV with --map, or plain text.
    BASE may hold adapters (smollm2:135m+polite); they stay as they are, and the new one is learned on top.
    Ctrl-C writes a checkpoint; --resume goes on from it.

    \b
    nomoat train smollm2:135m tickets.jsonl --test tickets-test.jsonl --name tickets
    nomoat run smollm2:135m+tickets
    """
    from nomoat.train.display import make_display
    from nomoat.train.run import train

    if targets is not None:
        options["targets"] = tuple(target.strip() for target in targets.split(","))
    display = make_display(as_json)
    ask = not (yes or as_json) and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        result = train(
            base,
            data,
            map=_pairs(mapping),
            format=layout,
            allow=frozenset(allow),
            dry_run=dry_run,
            confirm=(lambda: click.confirm("Start?", default=True)) if ask else None,
            report=display,
            **options,
        )
    finally:
        display.close()
    if as_json:
        click.echo(json.dumps({"event": "done", **result.as_json()}))
    elif result.path is not None:
        _finish(base, result)
    return 128 + signal.SIGINT if result.interrupted == signal.SIGINT else 0


def _pairs(mapping: tuple[str, ...]) -> dict[str, str] | None:
    made = {}
    for item in mapping:
        field, equals, column = item.partition("=")
        if not (field and equals and column):
            raise click.UsageError(f"--map {item}: expected FIELD=COLUMN, for example prompt=question")
        made[field] = column
    return made or None


def _finish(base: str, result: TrainResult) -> None:
    """What was learned, a few answers before and after, and how to go on."""
    from nomoat.train.display import duration

    if result.before is not None and result.after is not None:
        from rich.console import Console

        from nomoat.evals.compare import compare
        from nomoat.evals.report import print_changes, verdict_line

        comparison = compare(result.before, result.after)
        console = Console(highlight=False)
        console.print(f"\n{verdict_line(comparison)}", soft_wrap=True)
        print_changes(console, comparison.changed[:3])
    click.echo(
        f"\ntrained in {duration(result.train_seconds)}, {result.tokens_per_second:,.0f} tokens/s, "
        f"at most {result.peak_rss_mb:,.0f} MB of memory\n"
        f"the adapter is in {printable(str(result.path))}\n\n"
        f"  nomoat run {printable(base)}+{result.name}\n"
        f"  nomoat eval {printable(base)}+{result.name} ROWS.jsonl\n"
        f"  nomoat adapters show {result.name}"
    )
