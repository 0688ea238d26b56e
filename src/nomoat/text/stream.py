"""Token ids -> text, one id at a time, never half a character."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nomoat.text.tokenizer import Tokenizer


class StreamDecoder:
    """Feed ids with `push`; it returns the text that has become certain. `finish` returns what is left.

    The concatenation equals `tokenizer.decode(ids)`: bytes that can never become valid UTF-8 turn into U+FFFD. With `continues`
    the ids go on with an earlier text, and a space at their beginning is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.drops_first_space and not continues
        self._at_start = True

    def push(self, token: int) -> str:
        """Text that `token` completes, possibly empty. Raises InputError for an id outside the vocabulary."""
        data = self._tokenizer.piece(token, skip_special=self._skip_special)
        if data and self._at_start:
            self._at_start = False
            if self._drops_space and not self._tokenizer.is_special(token) and data.startswith(b" "):
                data = data[1:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The bytes of an unfinished character, as U+FFFD; resets the decoder."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._at_start = True
        return rest
