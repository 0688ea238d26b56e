"""Keeps control strings inside user text from becoming control tokens, whatever a template does with that text.

A template prints control strings ("<|im_end|>") and user text into one string, and only then is it cut into tokens. So before
rendering, a guard character is put into every control string of the user's text, and where a piece of text could complete a
control string together with its neighbour. Tokenization removes the guard after the control tokens have been found.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice
from typing import Any

from nomoat.errors import TemplateError

_PRIVATE = range(0xE000, 0xF900)  # characters without a meaning
_USED = re.compile(r"[\ue000-\uf8ff]|\\u[ef][0-9a-fA-F]{3}")


def unused_characters(count: int, *values: Any) -> list[str]:
    """`count` private-use characters that occur in none of `values`, not even escaped as JSON."""
    used: set[int] = set()
    for text in _strings(list(values)):
        for match in _USED.findall(text):
            used.add(ord(match) if len(match) == 1 else int(match[2:], 16))
    free = list(islice((chr(code) for code in _PRIVATE if code not in used), count))
    if len(free) < count:
        raise TemplateError("the text uses every private-use character of Unicode", code="E_LIMIT")
    return free


class Guard:
    """Puts `mark` into control strings; see above."""

    def __init__(self, control_strings: tuple[str, ...], mark: str) -> None:
        self.mark = mark
        self._any = bool(control_strings)
        self._inside, self._heads, self._tails = _parts(control_strings)
        self._longest = max(map(len, control_strings), default=1)

    def __call__(self, value: Any) -> Any:
        """`value` with all its texts guarded; lists and dictionaries are copied."""
        if isinstance(value, str):
            return self._text(value) if self._any else value
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        text = self._inside.sub(lambda match: match.group()[0] + self.mark + match.group()[1:], text)
        core = text.strip()
        if not core:
            return text
        begin = text.index(core[0])
        end = begin + len(core)
        lengths = range(1, min(self._longest, len(core)) + 1)
        if any(core[-n:] in self._heads for n in lengths):
            text = text[:end] + self.mark + text[end:]
        if any(core[:n] in self._tails for n in lengths):
            text = text[:begin] + self.mark + text[begin:]
        return text


@lru_cache(maxsize=4)
def _parts(control_strings: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
    """A pattern that finds any control string; all their proper beginnings; all their proper ends."""
    inside = re.compile("|".join(re.escape(s) for s in sorted(control_strings, key=len, reverse=True)))
    heads = frozenset(s[:n] for s in control_strings for n in range(1, len(s)))
    tails = frozenset(s[n:] for s in control_strings for n in range(1, len(s)))
    return inside, heads, tails


def _strings(values: list[Any]) -> list[str]:
    """Every text in nested lists and dictionaries, keys included."""
    found, stack = [], values
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found
