"""How an answer is graded: one function per metric, (got, expected) -> score from 0 to 1, and the table of them.

Nothing here knows about models. `loss` has no function: it is computed from log-probabilities by `evals.run`; nor has `pass@k`,
which comes from running answers (`evals.tasks`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Metric:
    """`grade` is None where no text is compared. `binary` scores are 0 or 1. `partial` is a second, softer view.

    `per_token` scores are nats per token: rows weigh by their tokens. All others are shares, from 0 to 1.
    """

    meaning: str
    grade: Score | None
    binary: bool = True
    higher_is_better: bool = True
    partial: Score | None = None
    partial_meaning: str = ""
    per_token: bool = False


def exact(got: str, expected: str) -> float:
    """1 if both texts are equal once every run of whitespace is one space and the ends are trimmed."""
    return float(_squeeze(got) == _squeeze(expected))


def contains(got: str, expected: str) -> float:
    """1 if `expected` occurs in `got`, ignoring case and the amount of whitespace, and not inside a longer word.

    "no" is not contained in "I know". An empty reference is contained in an empty answer only.
    """
    needle, hay = _squeeze(expected).casefold(), _squeeze(got).casefold()
    if not needle:
        return float(not hay)
    left = r"(?<!\w)" if re.match(r"\w", needle[0]) else ""
    right = r"(?!\w)" if re.match(r"\w", needle[-1]) else ""
    return float(re.search(left + re.escape(needle) + right, hay) is not None)


# A sign counts only where it cannot be a minus between two operands; commas only as thousands separators.
_NUMBER = re.compile(r"(?P<sign>(?<![\w)])-)?[$€£]?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number in `text` ("$1,234.50" -> 1234.50), or None. Grading school maths by it is GSM8K's convention."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = Decimal(last["digits"].replace(",", ""))
    return -value if last["sign"] else value


def numeric(got: str, expected: str) -> float:
    """1 if the last number of the answer equals the last number of the reference (18 = 18.0); 0 if either has none."""
    number, wanted = last_number(got), last_number(expected)
    return float(number is not None and number == wanted)


def json_equal(got: str, expected: str) -> float:
    """1 if the answer parses as JSON and equals the reference; the order of keys does not matter, types do (1 is not true)."""
    answer, wanted = _parse(got), _parse(expected)
    if answer is _UNPARSED or wanted is _UNPARSED:
        return 0.0
    return float(_fields(answer) == _fields(wanted))


def json_fields(got: str, expected: str) -> float:
    """Share of fields that agree: equal leaves / leaves on either side, so extra fields cost as much as missing ones."""
    answer, wanted = _parse(got), _parse(expected)
    if answer is _UNPARSED or wanted is _UNPARSED:
        return 0.0
    ours, theirs = _fields(answer), _fields(wanted)
    return sum(ours[path] == theirs[path] for path in ours.keys() & theirs.keys()) / len(ours.keys() | theirs.keys())


def rouge_l(got: str, expected: str) -> float:
    """ROUGE-L F1 (Lin 2004): harmonic mean of LCS / answer words and LCS / reference words; lower case, no punctuation."""
    answer, wanted = _words(got), _words(expected)
    if not answer or not wanted:
        return float(answer == wanted)
    common = _lcs_length(answer, wanted)
    return 2 * common / (len(answer) + len(wanted))


METRICS: dict[str, Metric] = {
    "exact": Metric("answers equal to the reference (whitespace normalised)", exact),
    "json": Metric("answers equal to the reference as JSON", json_equal, partial=json_fields, partial_meaning="equal fields"),
    "contains": Metric("answers that contain the reference", contains),
    "numeric": Metric("answers whose last number is the reference's", numeric),
    "rouge": Metric("ROUGE-L F1 against the reference", rouge_l, binary=False),
    "loss": Metric(
        "negative log-probability of the reference, nats per token",
        None,
        binary=False,
        higher_is_better=False,
        per_token=True,
    ),
}
_PASSED = Metric("problems whose one answer passes the tests", None)
_PASS_AT_K = Metric("chance that one of k answers passes the tests", None, binary=False)


def rule_of(name: str) -> Metric:
    """The rule behind a result's `metric`: a row of METRICS, or `pass@1` (one answer each) and `pass@K of N` of `evals.tasks`."""
    if name.startswith("pass@"):
        return _PASSED if name == "pass@1" else _PASS_AT_K
    return METRICS[name]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


_UNPARSED = object()
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n?```\Z", re.DOTALL)


def _parse(text: str) -> Any:
    """The value of a JSON text, a Markdown fence around it allowed; `_UNPARSED` if it is none (NaN and Infinity are not JSON)."""
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError also covers whole numbers beyond Python's digit limit
        return _UNPARSED


def _refuse(word: str) -> Any:
    raise ValueError(word)


def _fields(value: Any) -> dict[tuple[str | int, ...], tuple[str, Any]]:
    """Leaves of a JSON value by their path, each with its kind, so that 1 and true differ and 1 and 1.0 do not. No recursion."""
    leaves: dict[tuple[str | int, ...], tuple[str, Any]] = {}
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict) and item:
            pending.extend(((*path, key), child) for key, child in item.items())
        elif isinstance(item, list) and item:
            pending.extend(((*path, index), child) for index, child in enumerate(item))
        else:
            number = isinstance(item, int | float) and not isinstance(item, bool)
            leaves[path] = ("number" if number else type(item).__name__, item if not isinstance(item, dict | list) else None)
    return leaves


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, one big-integer operation per word of `b` (Hyyrö 2004).

    Bit i of `row` is 0 where the LCS grows at a[i]; the carry of the addition moves each step to its new place.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    mask = (1 << len(a)) - 1
    row = mask
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & mask
    return len(a) - row.bit_count()
