"""Score a model, with or without adapters, on rows that carry a reference answer.

The reference of a row is its last assistant message; the prompt is every message before it, put through the same template
as in training and in chat. Answers are generated in batches, greedily unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nomoat.errors import DataError, InputError, printable
from nomoat.evals.intervals import bootstrap, wilson
from nomoat.evals.metrics import METRICS, Metric, rule_of

if TYPE_CHECKING:
    from nomoat.data.readers import Row
    from nomoat.engine.generate import Sampling
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack

T = TypeVar("T")
Progress = Callable[[int, int], None]

#: Rows of a loss pack: enough for full speed, small enough for a laptop's memory.
LOSS_PACK_TOKENS = 2048
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Record:
    """One row's outcome. `score` is in 0..1; for `loss` it is nats per token. `tokens` were generated (for `loss`: scored)."""

    line: int
    prompt: list[dict[str, Any]]
    expected: str
    got: str
    score: float
    tokens: float
    finish_reason: str = ""
    partial: float | None = None


@dataclass(frozen=True)
class Result:
    """Mean score with its 95 % interval. `partial` is the softer view of the metric, where it has one (json: fields)."""

    metric: str
    score: float
    low: float
    high: float
    n: int
    records: list[Record] = field(repr=False)
    seconds: float = 0.0
    max_tokens: int | None = None
    partial: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens (for `loss`: tokens in the loss) per second of wall time, prompts included in the time."""
        return sum(r.tokens for r in self.records) / self.seconds if self.seconds > 0 else 0.0

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "records"}
        return plain | {"tokens_per_second": round(self.tokens_per_second, 1), "seconds": round(self.seconds, 2)}


def evaluate(
    model: Model | str,
    rows: Iterable[Row] | Path | str,
    metric: str,
    *,
    stack: Stack | None = None,
    sampling: Sampling | None = None,
    max_batch: int = 16,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    output: Path | str | None = None,
) -> Result:
    """Grade the model's answer to every row (or to a seeded random `limit` of them) with one of `METRICS`.

    `model` may be a name, adapters included ("smollm2:135m+tickets@0.8"), and `rows` a data file.
    `sampling` None means greedy, with a token limit that follows from the longest reference answer. `progress` is called
    with (rows done, rows in all). `output` names a JSON-lines file that receives one record per row.
    Raises InputError for an unknown metric and for an empty set, DataError for a row without a reference or too long.
    """
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    if isinstance(rows, Path | str):
        from nomoat.data.readers import read_examples

        rows = read_examples(rows)
    chosen = sample_rows(list(rows), limit, seed)
    if not chosen:
        raise InputError("no rows to evaluate: the data set is empty")
    if isinstance(model, str):
        from nomoat.adapters.open import open_model

        if stack is not None:
            raise InputError("give either the adapters in the model's name or `stack`, not both")
        model, stack = open_model(model)
    if progress:
        progress(0, len(chosen))
    began = time.perf_counter()
    rule = METRICS[metric]
    used: int | None = None
    if rule.grade is None:
        records = _loss_records(model, chosen, stack, progress)
    else:
        sampling = sampling or greedy_for(model, chosen, metric)
        used = sampling.max_tokens
        records = _answer_records(model, chosen, rule, stack, sampling, max_batch, progress)
    result = summarise(metric, records, time.perf_counter() - began, used)
    if output is not None:
        write_records(Path(output), records)
    return result


def sample_rows(rows: Sequence[T], limit: int | None, seed: int = 0) -> list[T]:
    """At most `limit` rows, drawn at random with a seed and kept in file order: many files are sorted by label."""
    if limit is None or limit >= len(rows):
        return list(rows)
    picked = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in picked]


def summarise(metric: str, records: list[Record], seconds: float, max_tokens: int | None = None) -> Result:
    """Join per-row scores: Wilson's interval for scores of 0 or 1, else a bootstrap over rows (loss: rows weigh by tokens).

    Where all rows have the same share, a bootstrap would claim to be certain: Wilson's interval there too, which is wider.
    """
    rule, scores = rule_of(metric), [r.score for r in records]
    weights = [r.tokens for r in records] if rule.per_token else [1.0] * len(records)
    mean = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
    alike = len(set(scores)) == 1 and not rule.per_token
    low, high = wilson(sum(scores), len(scores)) if rule.binary or alike else bootstrap(scores, weights)
    softer = [r.partial for r in records if r.partial is not None]
    return Result(
        metric=metric,
        score=mean,
        low=low,
        high=high,
        n=len(records),
        records=records,
        seconds=seconds,
        max_tokens=max_tokens,
        partial=sum(softer) / len(softer) if softer else None,
    )


def split_row(row: Row) -> tuple[list[dict[str, Any]], str]:
    """(prompt messages, reference answer). Raises DataError if the row does not end with an assistant's message."""
    last = row.messages[-1] if row.messages else {}
    if last.get("role") != "assistant" or len(row.messages) < 2:
        raise DataError(
            f"line {row.line}: no reference answer: expected at least one message, and an assistant message at the end. "
            "Only `--metric loss` and `--perplexity` work without one",
            code="E_NO_REFERENCE",
            line=row.line,
            field="messages",
        )
    if last.get("tool_calls"):
        from nomoat.data.tool_text import tools_as_text

        (last,) = tools_as_text([last], [])
    return list(row.messages[:-1]), str(last.get("content") or "")


def greedy_for(model: Model, rows: Sequence[Row], metric: str) -> Sampling:
    """Greedy sampling whose token limit fits the references.

    For metrics that need the whole answer equal, half as much again as the longest reference is room enough for another way
    of cutting it into tokens; a model that rambles past it has already failed, and is not paid for.
    """
    from nomoat.engine.generate import Sampling

    longest = max(len(model.tokenizer.encode(split_row(row)[1], add_bos=False)) for row in rows)
    room = longest * 3 // 2 + 8
    return Sampling(temperature=0.0, max_tokens=room if metric in ("exact", "json") else max(room, DEFAULT_MAX_TOKENS))


def _answer_records(
    model: Model,
    rows: Sequence[Row],
    rule: Metric,
    stack: Stack | None,
    sampling: Sampling,
    max_batch: int,
    progress: Progress | None,
) -> list[Record]:
    from nomoat.engine.generate import generate

    assert rule.grade is not None
    pairs = [split_row(row) for row in rows]
    prompts = [_encode(model, row, messages, sampling.max_tokens) for row, (messages, _) in zip(rows, pairs, strict=True)]
    completions = generate(model, prompts, sampling, stacks=[stack] * len(prompts), max_batch=max_batch, progress=progress)
    return [
        Record(
            line=row.line,
            prompt=messages,
            expected=expected,
            got=done.text,
            score=rule.grade(done.text, expected),
            tokens=len(done.tokens),
            finish_reason=done.finish_reason,
            partial=rule.partial(done.text, expected) if rule.partial else None,
        )
        for row, (messages, expected), done in zip(rows, pairs, completions, strict=True)
    ]


def _encode(model: Model, row: Row, messages: list[dict[str, Any]], max_tokens: int) -> list[int]:
    """Prompt tokens; refuses what does not fit into the model's context instead of cutting it."""
    from nomoat.data.mask import prompt_tokens

    tokens = prompt_tokens(messages, model.tokenizer, model.template, tools=row.tools)
    if len(tokens) + max_tokens > model.spec.context:
        raise DataError(
            f"line {row.line}: a prompt of {len(tokens):,} tokens and an answer of up to {max_tokens:,} do not fit into the "
            f"model's context of {model.spec.context:,}. Shorten the row, or lower --max-tokens",
            code="E_CONTEXT",
            line=row.line,
        )
    return tokens


def _loss_records(model: Model, rows: Sequence[Row], stack: Stack | None, progress: Progress | None) -> list[Record]:
    """Mean negative log-probability of every row's weighted tokens, in the order of `rows`; the loss that training reports."""
    import numpy as np

    from nomoat.data.mask import Example, tokenize
    from nomoat.data.pack import pack

    examples: list[Example] = []
    for row in rows:
        example = tokenize(row, model.tokenizer, model.template, max_tokens=model.spec.context)
        if not isinstance(example, Example):
            raise DataError(f"line {row.line} cannot be scored: {printable(str(example))}", code="E_ROW", line=row.line)
        examples.append(example)
    longest = max(len(example.tokens) for example in examples)
    surprise, weight, done = np.zeros(len(rows)), np.zeros(len(rows)), 0
    for packed in pack(examples, max(LOSS_PACK_TOKENS, longest), order=range(len(examples))):
        at = np.flatnonzero(packed.weights)
        owner = np.asarray(packed.examples)[np.searchsorted(packed.starts, at, side="right") - 1]
        np.add.at(surprise, owner, -packed.weights[at] * model.logprobs(packed, stack=stack))
        np.add.at(weight, owner, packed.weights[at])
        done += len(packed.examples)
        if progress:
            progress(done, len(rows))
    return [
        Record(
            line=row.line,
            prompt=list(row.messages[:-1]),
            expected=row.text or str(row.messages[-1].get("content") or ""),
            got="",
            score=float(surprise[i] / weight[i]),
            tokens=float(weight[i]),
        )
        for i, row in enumerate(rows)
    ]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One JSON object per row, complete or not there at all."""
    from nomoat.files.atomic import atomic_write

    with atomic_write(path) as file:
        for record in records:
            file.write((json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n").encode())
