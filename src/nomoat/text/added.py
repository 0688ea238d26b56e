"""Tokens that are cut out of a text before any merging: control tokens, and tokens that a user added to the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix

from nomoat.errors import InputError, printable

MAX_ADDED = 100_000
MAX_CHARS = 512


@dataclass(frozen=True)
class AddedToken:
    """`control` tokens steer the model and never come out of plain text. The other flags are those of tokenizer.json:
    `lstrip` and `rstrip` swallow the white space before and after, `single_word` wants no letter or digit on either side."""

    id: int
    content: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokens:
    """Finds added tokens in a text: leftmost first, and of those that start at the same place the longest.

    Raises InputError E_LIMIT for more than 100,000 tokens or one longer than 512 characters, E_TYPE for an empty one.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        if len(tokens) > MAX_ADDED:
            raise InputError(f"{len(tokens):,} added tokens: expected at most {MAX_ADDED:,}", code="E_LIMIT")
        for token in tokens:
            if not token.content:
                raise InputError(f"added token {token.id} is empty", code="E_TYPE")
            if len(token.content) > MAX_CHARS:
                start = printable(token.content[:20])
                raise InputError(f"added token {token.id} ({start}...) has {len(token.content):,} characters: "
                                 f"expected at most {MAX_CHARS}", code="E_LIMIT")  # fmt: skip
        self._by_content = {token.content: token for token in tokens}
        self.control_strings = tuple(sorted(token.content for token in tokens if token.control))
        self._all = _matcher([token.content for token in tokens])
        self._not_control = _matcher([token.content for token in tokens if not token.control])
        self._control = _matcher(list(self.control_strings))

    def split(self, text: str, *, control: bool) -> Iterator[str | int]:
        """The text as plain pieces (str) and ids of added tokens; control tokens only if `control`."""
        matcher = self._all if control else self._not_control
        begin = 0
        for match in matcher.finditer(text) if matcher else ():
            token = self._by_content[match.group()]
            start, end = match.span()
            if start < begin or (token.single_word and _touches_word(text, start, end)):
                continue
            plain = text[begin:start]
            plain = plain.rstrip() if token.lstrip else plain
            if plain:
                yield plain
            yield token.id
            begin = end
            while token.rstrip and begin < len(text) and text[begin].isspace():
                begin += 1
        if begin < len(text):
            yield text[begin:]

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where control strings occur in `text`."""
        return [match.span() for match in self._control.finditer(text)] if self._control else []


def _touches_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return before.isalnum() or before == "_" or after.isalnum() or after == "_"


def _matcher(strings: list[str]) -> re.Pattern[str] | None:
    """A pattern for any of `strings`, built as a prefix tree so that the time per character does not grow with their number."""
    if not strings:
        return None
    try:
        return re.compile(_tree(sorted(set(strings))))
    except RecursionError:
        raise InputError("the added tokens are nested too deeply in one another", code="E_LIMIT") from None


def _tree(strings: list[str]) -> str:
    """`strings` sorted and distinct; the longest match wins because the empty rest is tried last."""
    branches = []
    for _, group in groupby((s for s in strings if s), key=lambda s: s[0]):
        members = list(group)
        prefix = commonprefix([members[0], members[-1]])
        rests = [s[len(prefix) :] for s in members]
        branches.append(re.escape(prefix) + (_tree(rests) if len(rests) > 1 else ""))
    if strings[0] == "":
        return f"(?:{'|'.join(branches)})?"
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
