"""Is a regular expression out of a file safe to run on a backtracking engine?"""

from __future__ import annotations

import re

from nomoat.errors import InputError, printable
from nomoat.text.pretokenizers import PRE_TOKENIZERS

MAX_CHARS = 2048
MAX_REPEATS = 3  # unbounded repeats in one alternative: time grows at worst with this power of a run's length
MAX_COUNT = 64
_KNOWN = frozenset(step for row in PRE_TOKENIZERS.values() for step in row.steps)
_TOKEN = re.compile(
    r"(?P<escape>\\[pP]\{[^{}]{1,40}\}|\\x\{[0-9A-Fa-f]{1,6}\}|\\.)"
    r"|(?P<open>\((?:\?(?:[imx]*:|>|=|!|<=|<!))?)"
    r"|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?)"
    r"|(?P<either>\|)"
    r"|(?P<set>\[)"
    r"|(?P<other>[^\\])",
    re.DOTALL,
)


def check_pattern(pattern: str) -> None:
    """Accepts the expressions of the pre-tokenizer table, and others that are short and repeat nothing that itself repeats.

    Raises InputError: E_LIMIT (over 2,048 characters), E_TYPE (repeats inside repeats, back references, calls, or a syntax
    outside the small set understood here).
    """
    if pattern in _KNOWN:
        return
    if len(pattern) > MAX_CHARS:
        raise InputError(f"a pattern of {len(pattern):,} characters: expected at most {MAX_CHARS:,}", code="E_LIMIT")
    groups: list[list[int]] = [[0, 0]]  # for each open group: [repeats in this alternative, most in an earlier one]
    last = 0  # unbounded repeats inside what a following quantifier would apply to
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        if match is None:
            raise _unsafe(pattern, "has a syntax that nomoat does not know")
        at = match.end()
        text = match.group()
        match match.lastgroup:
            case "open":
                if text == "(" and pattern.startswith("?", at):
                    raise _unsafe(pattern, "has a kind of group that nomoat does not know")
                groups.append([0, 0])
            case "close":
                if len(groups) == 1:
                    raise _unsafe(pattern, "closes a group that is not open")
                last = max(groups.pop())
                groups[-1][0] += last
            case "either":
                groups[-1] = [0, max(groups[-1])]
                last = 0
            case "repeat":
                if _unbounded(pattern, text):
                    if last:
                        raise _unsafe(pattern, "repeats something that itself repeats")
                    groups[-1][0] += 1
                last = 1
            case "set":
                at = _end_of_set(pattern, at)
                last = 0
            case "escape":
                if text[1] in "123456789gkKGRX":
                    raise _unsafe(pattern, f"uses `{printable(text)}`")
                last = 0
            case _:
                last = 0
        if max(groups[-1]) > MAX_REPEATS:
            raise _unsafe(pattern, f"has more than {MAX_REPEATS} unbounded repeats in a row")
    if len(groups) > 1:
        raise _unsafe(pattern, "has a group that is not closed")


def _unbounded(pattern: str, quantifier: str) -> bool:
    if quantifier[0] in "*+":
        return True
    if quantifier[0] == "?":
        return False
    numbers = [int(n) for n in re.findall(r"\d+", quantifier)]
    if any(n > MAX_COUNT for n in numbers):
        raise _unsafe(pattern, f"repeats more than {MAX_COUNT} times")
    return quantifier.rstrip("?+").endswith(",}")


def _end_of_set(pattern: str, at: int) -> int:
    """Index after the `]` of a character set whose `[` is before `at`; sets may nest."""
    depth = 1
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise _unsafe(pattern, "has a character set that is not closed")


def _unsafe(pattern: str, why: str) -> InputError:
    return InputError(f"the pattern `{printable(pattern[:60])}` {why}, so its running time cannot be bounded", code="E_TYPE")
