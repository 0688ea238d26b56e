"""From a data file to what the loop eats: examples to learn, examples held out, rows to score."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomoat.data.inspect import Inspection, inspect_data
from nomoat.data.pack import Pack, pack, shuffled_order, useful_rows
from nomoat.data.readers import Row, read_examples, stream_examples
from nomoat.train.plan import TrainOptions

if TYPE_CHECKING:
    from nomoat.data.mask import Example
    from nomoat.engine.model import Model

DEFAULT_CONTEXT = 2048
#: Below this many rows none is held out unless a test file says what to score: every row counts.
LEAST_TO_HOLD_OUT = 20
#: Orders of the loop are (seed, epoch) with epochs from 0; the split draws from a stream of its own.
SPLIT_STREAM = 1 << 32
#: Answers up to this long are compared as a whole; longer ones are scored by their loss.
SHORT_ANSWER = 200


@dataclass(frozen=True)
class Prepared:
    """`score` holds the rows to score before and after; `held_out` says that they come from the training file."""

    inspection: Inspection
    train: list[Example]
    validation: list[Example]
    score: list[Row]
    held_out: bool

    def validation_packs(self, options: TrainOptions) -> list[Pack]:
        return pack(self.validation, options.max_tokens)

    def digest(self) -> str:
        """sha256 over every token and weight, in order: what the run learns from and is validated on."""
        hasher = hashlib.sha256()
        for name, examples in (("train", self.train), ("validation", self.validation)):
            for example in examples:
                hasher.update(f"{name} {len(example.tokens)}\n".encode())
                hasher.update(example.tokens.astype("<i4").tobytes())
                hasher.update(example.weights.astype("<f4").tobytes())
        return hasher.hexdigest()

    def counts(self) -> dict[str, int]:
        """For the plan: rows, tokens of one epoch, learned tokens, and the longest example."""
        return {
            "rows": len(self.train),
            "validation_rows": len(self.validation),
            "tokens": sum(useful_rows(example) for example in self.train),
            "loss_tokens": sum(int((example.weights != 0).sum()) for example in self.train),
            "longest": max((len(example.tokens) for example in [*self.train, *self.validation]), default=0),
        }


def prepare(
    model: Model,
    data: Path,
    options: TrainOptions,
    *,
    test: Path | None = None,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    truncate: bool = False,
) -> Prepared:
    """Reads, tokenizes and splits. The split depends on the seed and the number of usable rows alone.

    Raises what `inspect_data` raises: DataError for rows and files, TemplateError for the chat template.
    """
    options.check_model(model.spec)
    context = options.context or min(model.spec.context, DEFAULT_CONTEXT)
    test_rows = None if test is None else read_examples(test, map=map, format=format, skip_bad=skip_bad)
    inspection = inspect_data(
        data,
        model.tokenizer,
        model.template,
        max_tokens=context,
        map=map,
        format=format,
        skip_bad=skip_bad,
        truncate=truncate,
        test=test_rows,
    )
    held = held_out_indices(len(inspection.examples), options)
    examples = inspection.examples
    train = [example for index, example in enumerate(examples) if index not in held]
    validation = [examples[index] for index in sorted(held)]
    if test_rows is not None:
        return Prepared(inspection, train, validation, test_rows, held_out=False)
    positions = {inspection.positions[index] for index in held}
    rows = stream_examples(data, map=map, format=format, skip_bad=skip_bad) if positions else ()
    return Prepared(inspection, train, validation, [row for at, row in enumerate(rows) if at in positions], held_out=True)


def held_out_indices(count: int, options: TrainOptions) -> set[int]:
    """Which of `count` examples are held out: none where there are few."""
    wanted = min(options.validation_rows, round(options.validation * count))
    if count < LEAST_TO_HOLD_OUT or wanted < 1:
        return set()
    return {int(index) for index in shuffled_order(count, options.seed, SPLIT_STREAM)[:wanted]}


def choose_metric(rows: Sequence[Row]) -> str:
    """A metric that fits the reference answers: `json` where all are JSON objects, `exact` where they are short, else `loss`."""
    answers = [_answer(row) for row in rows]
    if not answers or any(answer is None for answer in answers):
        return "loss"
    if all(_is_json_object(str(answer)) for answer in answers):
        return "json"
    short = sum(len(str(answer)) <= SHORT_ANSWER for answer in answers)
    return "exact" if short >= 0.9 * len(answers) else "loss"


def _answer(row: Row) -> str | None:
    last: dict[str, Any] = row.messages[-1] if row.messages else {}
    if last.get("role") != "assistant" or len(row.messages) < 2 or last.get("tool_calls"):
        return None
    return str(last.get("content") or "")


def _is_json_object(text: str) -> bool:
    import json

    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
