"""Guessing the next tokens, so that one forward pass can confirm several (Leviathan et al. 2023, arXiv 2211.17192).

The choice of a token is a function of its logits, the seed and its place (`native/op/sample.cc`), and a row's logits do not
depend on the rows computed with it. A guess is therefore kept exactly when it is the token that would have been chosen, and
the answer is the one without guessing, token by token, greedy or sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

#: Tokens that must repeat before a guess is made. Two match by chance too often: every wrong guess is a row for nothing.
MATCH = 3
#: Most tokens guessed at once. A decode step of one row waits for memory, and further rows cost about a quarter of it each.
LONGEST = 12


class PromptLookup:
    """Guesses that a text goes on as it did the last time its latest `MATCH` tokens occurred (Saxena 2023, prompt lookup).

    Nothing is guessed where nothing repeats. The length of guesses doubles while they are right and falls to what was right.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # MATCH tokens -> index of the token that followed them last
        self._length = 4
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds what was said."""
        for token in tokens:
            if len(self._tokens) >= MATCH:
                self._follows[tuple(self._tokens[-MATCH:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next. What repeats at the very end is taken to repeat further."""
        at = self._follows.get(tuple(self._tokens[-MATCH:]))
        return [] if at is None else list(itertools.islice(itertools.cycle(self._tokens[at:]), min(limit, self._length)))

    def judged(self, guessed: int, right: int) -> None:
        """Takes note of how many of the tokens guessed last were right."""
        self._length = min(2 * self._length, LONGEST) if right == guessed else max(1, right)
