"""SentencePiece BPE vocabularies (Llama 2, Mistral, Gemma): scores instead of merges.

Encoding starts from characters and always joins the two neighbours whose union has the best score, the leftmost of equals.
For the `tokenizers` library the same would be a list of merges with every way to cut every token in two, most of the time that
a model takes to open. This reads the scores as they are, and remembers the words that it has seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from heapq import heappop, heappush

from nomoat.errors import InputError

SPACE = "\u2581"
MAX_WORDS = 1 << 16  # remembered at once
MAX_WORD = 64  # characters of one


def encoder(ids: dict[str, int], scores: list[float], bytes_: dict[int, int], unknown: int | None) -> Callable[[str], list[int]]:
    """Text -> ids. `ids`: the tokens that text may turn into; `scores` by id; `bytes_`: value of a byte -> its token, for
    characters outside the vocabulary; `unknown` stands for those that have no byte tokens either."""
    word_starts = _word_starts(ids)
    seen: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        """Raises InputError E_TOKENIZER for a character that the vocabulary cannot write."""
        out: list[int] = []
        for word in word_starts.split(text.replace(" ", SPACE)):
            found = seen.get(word)
            if found is None:
                found = [i for symbol in _join(word, ids, scores) for i in _symbol_ids(symbol, ids, bytes_, unknown)]
                if len(word) <= MAX_WORD:
                    if len(seen) >= MAX_WORDS:
                        seen.clear()
                    seen[word] = found
            out += found
        return out

    return encode


def _word_starts(ids: dict[str, int]) -> re.Pattern[str]:
    """Where no token goes across, so that what lies between can be encoded by itself: before a run of spaces, but for those few
    characters that a token holds before a space (Gemma has `>▁</`)."""
    joined = {text[at - 1] for text in ids if SPACE in text for at in range(1, len(text)) if text[at] == SPACE}
    return re.compile(f"(?<![{re.escape(''.join(sorted(joined | {SPACE})))}])(?={SPACE})")


def _join(word: str, ids: dict[str, int], scores: list[float]) -> list[str]:
    """The symbols that are left when no two neighbours can be joined."""
    symbols = list(word)
    count = len(symbols)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    pairs: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < count:
            union = symbols[left] + symbols[right]
            i = ids.get(union)
            if i is not None:
                heappush(pairs, (-scores[i], left, right, union))

    for left in range(count - 1):
        offer(left, left + 1)
    while pairs:
        _, left, right, union = heappop(pairs)
        # an earlier join took one of the two away, or made it longer
        if after[left] != right or symbols[left] + symbols[right] != union:
            continue
        symbols[left], symbols[right] = union, ""
        after[left], after[right] = after[right], -1
        if after[left] < count:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in symbols if symbol]


def _symbol_ids(symbol: str, ids: dict[str, int], bytes_: dict[int, int], unknown: int | None) -> list[int]:
    found = ids.get(symbol)
    if found is not None:
        return [found]
    values = symbol.encode()
    if all(value in bytes_ for value in values):
        return [bytes_[value] for value in values]
    if unknown is None:
        raise InputError(
            f"the tokenizer cannot write U+{ord(symbol):04X}: its vocabulary has neither the character nor its bytes, and no"
            " token for what is unknown",
            code="E_TOKENIZER",
        )
    return [unknown]
