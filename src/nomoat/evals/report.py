"""Results for people (text with a table), for programs (JSON) and for documents (Markdown)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nomoat.evals.compare import Comparison
from nomoat.evals.metrics import rule_of
from nomoat.evals.run import Record, Result

if TYPE_CHECKING:
    from rich.console import Console

    from nomoat.evals.perplexity import Perplexity

SAMPLE_WIDTH = 240


def figure(metric: str, value: float, signed: bool = False) -> str:
    """A score as people read it: `12.5 %`, or nats with three decimals for `loss`. Differences carry a sign and are in points."""
    plus = "+" if signed else ""
    if rule_of(metric).per_token:
        return f"{value:{plus}.3f}"
    return f"{100 * value:{plus}.1f} {'points' if signed else '%'}"


def interval(metric: str, low: float, high: float, signed: bool = False) -> str:
    """The 95 % interval in the units of `figure`."""
    plus = "+" if signed else ""
    if rule_of(metric).per_token:
        return f"{low:{plus}.3f} to {high:{plus}.3f}"
    return f"{100 * low:{plus}.1f} to {100 * high:{plus}.1f}"


def result_line(result: Result) -> str:
    """`json 12.5 % (95 % interval 8.6 to 17.8, 200 rows), equal fields 61.0 %`."""
    text = (
        f"{result.metric} {figure(result.metric, result.score)} "
        f"(95 % interval {interval(result.metric, result.low, result.high)}, {result.n:,} {'row' if result.n == 1 else 'rows'})"
    )
    if result.partial is not None:
        text += f", {rule_of(result.metric).partial_meaning} {100 * result.partial:.1f} %"
    return text


def p_text(p: float) -> str:
    """`p < 0.0001` below what anyone acts on, three decimals above."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"


def verdict_line(comparison: Comparison) -> str:
    """One sentence that says whether it got better, by how much, and how sure that is."""
    c = comparison
    change = figure(c.metric, c.difference, signed=True)
    words = {"better": "Better", "worse": "Worse", "unclear": "No clear difference"}[c.verdict]
    return (
        f"{words}: {change} (95 % interval {interval(c.metric, c.low, c.high, signed=True)}; {p_text(c.p_value)}); "
        f"{c.gained:,} rows better, {c.lost:,} worse, {c.before.n - c.gained - c.lost:,} the same."
    )


def print_results(console: Console, results: Iterable[tuple[str, Result]]) -> None:
    """A table with one line per model and result."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("metric")
    for name in ("score", "95 % interval", "rows"):
        table.add_column(name, justify="right")
    lines = list(results)
    softer = any(r.partial is not None for _, r in lines)
    if softer:
        table.add_column(rule_of(lines[0][1].metric).partial_meaning, justify="right")
    table.add_column("tokens/s", justify="right")
    for model, r in lines:
        cells = [model, r.metric, figure(r.metric, r.score), interval(r.metric, r.low, r.high), f"{r.n:,}"]
        cells += [f"{100 * r.partial:.1f} %" if r.partial is not None else ""] if softer else []
        table.add_row(*map(plain, cells), f"{r.tokens_per_second:,.0f}")
    console.print(table)


def print_changes(console: Console, pairs: list[tuple[Record, Record]]) -> None:
    """Rows whose score changed: the question, the reference, and both answers."""
    for before, after in pairs:
        _print_row(console, before, {"before": before.got, "after": after.got})


def print_misses(console: Console, result: Result, count: int) -> None:
    """The first rows that were not answered fully right."""
    if not rule_of(result.metric).per_token:
        for record in [r for r in result.records if r.score < 1][:count]:
            _print_row(console, record, {"got": record.got})


def _print_row(console: Console, record: Record, answers: dict[str, str]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 2))
    for label, text in ({"asked": question(record), "expected": record.expected} | answers).items():
        grid.add_row(label, plain(shorten(text)))
    console.print(f"\nline {record.line}", style="bold")
    console.print(grid)


def question(record: Record) -> str:
    """What the user said last."""
    asked = [m for m in record.prompt if m.get("role") == "user"] or record.prompt
    return str(asked[-1].get("content") or "") if asked else ""


def shorten(text: str, width: int = SAMPLE_WIDTH) -> str:
    """One line of at most `width` characters; text of models and files never reaches the terminal raw."""
    from nomoat.errors import printable

    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def plain(text: str) -> Any:
    """Text that rich shows as it is: square brackets in it are no markup."""
    from rich.text import Text

    return Text(text)


def to_json(results: dict[str, Result], comparison: Comparison | None = None) -> str:
    """One line of JSON: a summary per model, and the comparison."""
    body: dict[str, Any] = {"results": {name: r.summary() for name, r in results.items()}}
    if comparison is not None:
        body["comparison"] = {k: v for k, v in comparison.summary().items() if k not in ("before", "after")}
    return json.dumps(body, ensure_ascii=False)


def to_markdown(results: Iterable[tuple[str, Result]], comparison: Comparison | None = None) -> str:
    """A table to paste into a model card or an issue."""
    lines = ["| model | metric | score | 95 % interval | rows |", "|---|---|---|---|---|"]
    for name, r in results:
        cells = (_cell(name), r.metric, figure(r.metric, r.score), interval(r.metric, r.low, r.high), f"{r.n:,}")
        lines.append(f"| {' | '.join(cells)} |")
    if comparison is not None:
        lines += ["", verdict_line(comparison)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def perplexity_line(result: Perplexity) -> str:
    """`perplexity 12.345 ± 0.067 (20,123 tokens in 79 windows of 512, convention llama.cpp)`."""
    return (
        f"perplexity {result.perplexity:.4f} ± {result.error:.4f} ({result.tokens:,} tokens scored in {result.windows:,} windows "
        f"of {result.context:,}, convention {result.convention}, {result.tokens_per_second:,.0f} tokens/s)"
    )
