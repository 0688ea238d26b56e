"""Guessing the next tokens, so that one forward pass can confirm several (Leviathan et al. 2023, arXiv 2211.17192).

The choice of a token is a function of its logits, the seed and its place (`native/op/sample.cc`), and a row's logits do not
depend on the rows computed with it. A guess is therefore kept exactly when it is the token that would have been chosen, and
the answer is the one without guessing, token by token, greedy or sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from nomoat.engine.kv import Sequence
from nomoat.errors import ModelError, printable

if TYPE_CHECKING:
    from nomoat.engine.model import Float32, Model

#: Repeated tokens from which on a place is compared with others, and from which on a guess pays where rows are dear.
MATCH = 3
#: Latest places of MATCH tokens that are compared.
PLACES = 8
#: So many tokens fewer are guessed than repeat.
MARGIN = 2
#: Most tokens guessed at once. On two cores of Zen 3 two rows of SmolLM2-135M cost 1.1 steps of one row, which waits for memory,
#: four 1.7, eight 2.8.
LONGEST = 10
#: Most tokens guessed at once by a draft model, each of which is one of its steps.
LONGEST_DRAFT = 8


class PromptLookup:
    """Guesses that a text goes on as it did where its latest tokens occurred before (Saxena 2023, prompt lookup).

    The place with the longest match counts, of equals the latest. Of k tokens that repeat, k - MARGIN more are guessed, at least
    one: the longer a match, the surer. `docs/log.md`, 2026-11-28, has what else was tried.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # fewer than MATCH tokens -> where the token that followed them is
        self._places: dict[tuple[int, ...], list[int]] = {}  # MATCH tokens -> the latest PLACES of those that followed them
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds what was said."""
        for token in tokens:
            at = len(self._tokens)
            for count in range(1, min(MATCH - 1, at) + 1):
                self._latest[tuple(self._tokens[-count:])] = at
            if at >= MATCH:
                places = self._places.setdefault(tuple(self._tokens[-MATCH:]), [])
                places.append(at)
                del places[:-PLACES]
            self._tokens.append(token)

    def guess(self, limit: int, least: int = 1) -> list[int]:
        """At most `limit` tokens that may come next, after at least `least` that repeat.

        What repeats at the very end is taken to repeat further.
        """
        places = self._places.get(tuple(self._tokens[-MATCH:]))
        if places:
            matched, at = max((self._matched(at), at) for at in places)
            return list(itertools.islice(itertools.cycle(self._tokens[at:]), min(limit, max(1, matched - MARGIN))))
        for count in range(min(MATCH - 1, len(self._tokens)), least - 1, -1):
            follower = self._latest.get(tuple(self._tokens[-count:]))
            if follower is not None:
                return self._tokens[follower : follower + min(limit, 1)]
        return []

    def _matched(self, at: int) -> int:
        """Tokens before `at` that are those at the end, as far as it matters."""
        most = min(LONGEST + MARGIN, at)
        return next((k for k in range(most) if self._tokens[at - 1 - k] != self._tokens[-1 - k]), most)


class Draft:
    """Guesses what a smaller model of the same vocabulary would say, with the draws that the answer itself will use.

    One belongs to one answer, or to one conversation: what the draft model has seen of it stays in its cache.
    """

    def __init__(self, model: Model, target: Model) -> None:
        """Raises ModelError where the vocabularies differ."""
        if model.tokenizer.vocab_hash() != target.tokenizer.vocab_hash():
            raise ModelError(
                f"the draft model {printable(model.spec.name)} has another vocabulary ({model.spec.vocab:,} tokens) than "
                f"{printable(target.spec.name)} ({target.spec.vocab:,} tokens); take a smaller model of the same family",
                code="E_TOKENIZER",
            )
        self.model = model
        self._sequence = Sequence()
        self._vocab = min(model.spec.vocab, target.spec.vocab)
        self._length = 4

    def guess(
        self, prompt: list[int], said: list[int], limit: int, choose: Callable[[Float32, SequenceOf[int]], int]
    ) -> list[int]:
        """At most `limit` tokens that may follow `said`; `choose` takes one from logits and what was said before it."""
        known, text = self._sequence.tokens, prompt + said
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, text, strict=False)))
        self.model.pool().cut(self._sequence, min(common, len(text) - 1))
        limit = min(limit, self._length, self.model.spec.context - len(text) + 1)
        guessed: list[int] = []
        while len(guessed) < limit:
            row = self.model.next_logits(self._sequence, (text + guessed)[len(self._sequence.tokens) :])
            guessed.append(choose(row[: self._vocab], said + guessed))
        return guessed

    def judged(self, guessed: int, right: int) -> None:
        """Takes note of how many of the tokens guessed last were right."""
        self._length = min(self._length + 2, LONGEST_DRAFT) if right == guessed else max(1, right)

    def release(self) -> None:
        """Gives the cache pages back."""
        self.model.pool().cut(self._sequence, 0)
