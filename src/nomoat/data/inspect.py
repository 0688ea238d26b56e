"""What is in a data file, before anything is trained: format, dropped rows, duplicates, leakage, lengths, what is learned."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nomoat.data.mask import Example, tokenize
from nomoat.data.readers import ReadLog, Row, stream_examples
from nomoat.errors import DataError, printable

if TYPE_CHECKING:
    from nomoat.text.template import ChatTemplate
    from nomoat.text.tokenizer import Tokenizer

MIN_EXAMPLES = 2  # one to train on, one to hold out
KEPT_REASONS = 20  # dropped rows whose line is remembered
PREVIEW_TOKENS = 400

# Bounded repetitions only: a hostile row costs linear time.
SECRETS: dict[str, re.Pattern[str]] = {
    "private keys": re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"),
    "API keys": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[opsur]_[A-Za-z0-9]{36}|xox[abpr]-[A-Za-z0-9-]{10}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30})"
    ),
    "access tokens": re.compile(r"\beyJ[\w-]{10,500}\.eyJ[\w-]{10,500}\."),
    "e-mail addresses": re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+\b"),
}


@dataclass
class Inspection:
    """The report, and the examples that training goes on with."""

    path: Path
    log: ReadLog
    max_tokens: int
    examples: list[Example] = field(default_factory=list)
    # of each example among the rows of `stream_examples`; lines will not do, since one line may hold a whole array
    positions: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    dropped_lines: list[tuple[int, str]] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)  # reason -> what exactly, for its first row
    truncated: int = 0
    duplicates: int = 0
    leaked: int = 0
    test_rows: int = 0  # 0: no test file was given
    secrets: Counter[str] = field(default_factory=Counter)
    preview: list[tuple[str, bool]] = field(default_factory=list)  # (text, learned) runs of the first example

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    @property
    def learned_tokens(self) -> int:
        return sum(int(np.count_nonzero(example.weights)) for example in self.examples)

    def histogram(self) -> list[tuple[int, int]]:
        """(upper bound of tokens, examples), bounds doubling; no empty bucket at either end."""
        counts = Counter(max(16, 1 << (len(example.tokens) - 1).bit_length()) for example in self.examples)
        if not counts:
            return []
        bounds = [1 << power for power in range(min(counts).bit_length() - 1, max(counts).bit_length())]
        return [(bound, counts[bound]) for bound in bounds]

    def warnings(self) -> list[str]:
        """What a person should know before training; sentences with the numbers."""
        made = []
        rows = self.log.rows
        if self.duplicates:
            made.append(f"{self.duplicates:,} of {rows:,} rows ({self.duplicates / rows:.0%}) repeat an earlier row")
        if self.leaked:
            share = self.leaked / self.test_rows
            made.append(
                f"{self.leaked:,} of {self.test_rows:,} test prompts ({share:.0%}) also occur in training: the score will flatter"
            )
        if self.truncated:
            made.append(f"{self.truncated:,} rows were cut to {self.max_tokens:,} tokens, as asked")
        made += [f"{count:,} rows hold {kind}; the model may learn and repeat them" for kind, count in self.secrets.items()]
        for name, count in self.log.ignored_fields.most_common(5):
            made.append(f"field `{printable(name)[:80]}` is not used ({count:,} times)")
        return made

    def render(self, *, color: bool = False) -> str:
        """The report as text for a terminal (`color`: ANSI green for what is learned; else it stands in [[ ]])."""
        used, rows = len(self.examples), self.log.rows
        out = [f"{printable(str(self.path))}: {self.log.format} format, {rows + self.log.skipped_rows:,} rows, {used:,} used"]
        if self.log.skipped_rows:
            out.append(f"  left out {self.log.skipped_rows:,}: not usable")
            out += [f"    {printable(message)}" for _, message in self.log.skipped[:3]]
        for reason, count in self.dropped.most_common():
            where = ", ".join(str(line) for line, why in self.dropped_lines if why == reason)
            out.append(f"  left out {count:,}: {reason} (line {where[:60]}; the first: {printable(self.details[reason])[:200]})")
        out += [f"  note: {text}" for text in self.warnings()]
        share = self.learned_tokens / max(1, self.tokens)
        out.append(f"  {self.tokens:,} tokens, of which {self.learned_tokens:,} ({share:.0%}) are learned")
        most = max((count for _, count in self.histogram()), default=1)
        for bound, count in self.histogram():
            out.append(f"  {'<=':>4} {bound:>6,} tokens {count:>7,} {'#' * round(40 * count / most)}")
        out.append("  the first example (" + ("green" if color else "[[marked]]") + " is learned):")
        out.append(marked(self.preview, color=color))
        return "\n".join(out)


def marked(runs: Sequence[tuple[str, bool]], *, color: bool) -> str:
    """Text with its learned runs marked, indented; control characters of the data are made visible."""
    before, after = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    pieces = []
    for text, learned in runs:
        shown = "\n".join(printable(line) for line in text.split("\n"))
        if learned:  # a colour ends with its line, so that a pager shows each line right
            shown = "\n".join(f"{before}{line}{after}" if line else "" for line in shown.split("\n"))
        pieces.append(shown)
    return "\n".join("    | " + line for line in "".join(pieces).split("\n"))


def inspect_data(
    path: Path | str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_tokens: int,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    truncate: bool = False,
    raw: bool = False,
    test: Path | str | Iterable[Row] | None = None,
) -> Inspection:
    """Reads, tokenizes and judges a training file; `test` (a file or rows) is looked through for the same prompts.

    Raises DataError: whatever `stream_examples` raises, and E_EMPTY where fewer than two examples are usable.
    """
    path = Path(path)
    report = Inspection(path, ReadLog(), max_tokens)
    prompts: set[bytes] = set()
    whole: set[bytes] = set()
    for row in stream_examples(path, map=map, format=format, skip_bad=skip_bad, log=report.log):
        prompts.add(_key(prompt_text(row)))
        said = row_text(row)
        key = _key(said)
        report.duplicates += key in whole
        whole.add(key)
        report.secrets.update(kind for kind, pattern in SECRETS.items() if pattern.search(said))
        _use(report, row, tokenizer, template, truncate=truncate, raw=raw)
    if len(report.examples) < MIN_EXAMPLES:
        reasons = "; ".join(
            f"{count:,} left out: {reason} ({printable(report.details[reason])[:200]})"
            for reason, count in report.dropped.most_common(3)
        )
        message = f"{len(report.examples)} usable rows; training needs at least {MIN_EXAMPLES}, one of them to hold out"
        raise DataError(f"{message}. {reasons}" if reasons else message, code="E_EMPTY", path=path)
    if test is not None:
        rows = stream_examples(test, map=map, format=format, skip_bad=skip_bad) if isinstance(test, Path | str) else test
        for row in rows:
            report.test_rows += 1
            report.leaked += _key(prompt_text(row)) in prompts
    return report


def _use(report: Inspection, row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, *, truncate: bool, raw: bool) -> None:
    made = tokenize(row, tokenizer, template, max_tokens=report.max_tokens, truncate=truncate, raw=raw)
    if isinstance(made, Example):
        report.truncated += made.truncated
        if not report.examples:
            report.preview = learned_runs(made, tokenizer)
        report.examples.append(made)
        report.positions.append(report.log.rows - 1)
        return
    report.dropped[made.reason] += 1
    report.details.setdefault(made.reason, made.detail)
    if len(report.dropped_lines) < KEPT_REASONS:
        report.dropped_lines.append((row.line, made.reason))


def learned_runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, learned) for each run of tokens that are alike, control tokens by name; at most PREVIEW_TOKENS tokens."""
    learned = example.weights[:PREVIEW_TOKENS] > 0
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(learned)]
    ids = example.tokens[:PREVIEW_TOKENS].tolist()
    runs = [(tokenizer.decode(ids[a:b], skip_special=False), bool(learned[a])) for a, b in pairwise(cuts)]
    return [*runs, (" ...", False)] if len(example.tokens) > PREVIEW_TOKENS else runs


def row_text(row: Row) -> str:
    """Everything that a row says."""
    if row.text is not None:
        return row.text
    return "\n".join(f"{m['role']}: {m['content']} {m.get('tool_calls', '')}" for m in row.messages)


def prompt_text(row: Row) -> str:
    """What the model is asked: all before the last answer; of plain text, the text."""
    if row.text is not None:
        return row.text
    last = max((at for at, m in enumerate(row.messages) if m["role"] == "assistant"), default=len(row.messages))
    return "\n".join(str(m["content"]) for m in row.messages[:last] if m["role"] != "system")


def _key(text: str) -> bytes:
    """Equal for texts that differ in case, spacing or punctuation at their ends only."""
    return hashlib.blake2b(" ".join(text.casefold().split()).strip(" .!?").encode(), digest_size=16).digest()
