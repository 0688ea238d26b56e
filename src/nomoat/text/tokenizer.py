"""Text <-> token ids, on the Rust `tokenizers` library, for GGUF vocabularies and Hugging Face folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nomoat.errors import InputError
from nomoat.text.added import AddedToken, AddedTokens

if TYPE_CHECKING:
    import tokenizers

    from nomoat.files.gguf import GgufFile
    from nomoat.text.fim import Fim

SPACE = "\u2581"  # SentencePiece writes a space as this


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SpacePrefix(IntEnum):
    """Where a space is put before plain text; if anywhere, the first space is dropped when decoding."""

    NEVER = 0
    START = 1  # of the text
    PIECES = 2  # the start, and after every added token


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens; `tokens[id]` is the text as stored, `types[id]` a TokenType."""

    tokens: list[str]
    types: bytes
    byte_level: bool  # tokens are bytes written as printable characters (GPT-2), else text with SPACE for a space
    added: tuple[AddedToken, ...]
    bos_id: int | None
    eos_id: int | None  # the one that the file names; templates print it as `eos_token`
    eos_ids: frozenset[int]
    add_bos: bool
    space_prefix: SpacePrefix = SpacePrefix.NEVER
    fim: Fim | None = None


class Tokenizer:
    """Immutable after construction, so one object may serve several threads.

    `bos_id` starts a text (added by `encode` if `add_bos`); `eos_ids` are all ids that end an answer: end of text, of turn,
    of message. `fim` are the tokens for filling a gap, None in models that were not taught to.
    """

    def __init__(self, vocabulary: Vocabulary, plain: Callable[[str], list[int]], *, prefix_once: bool = False) -> None:
        """`plain` encodes text that holds no added tokens and puts no space before it. `prefix_once`: no second space is put
        before a piece that has one."""
        self._vocabulary = vocabulary
        self._plain = plain
        self._prefix_once = prefix_once
        self._pieces: dict[int, bytes] = {}
        self.added = AddedTokens(vocabulary.added)
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.fim = vocabulary.fim
        self.byte_level = vocabulary.byte_level
        self.token_types = vocabulary.types
        self.drops_first_space = vocabulary.space_prefix != SpacePrefix.NEVER

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """The tokenizer inside a GGUF file. Raises FileFormatError (malformed), ModelError (a kind nomoat does not know)."""
        from nomoat.text.gguf_vocab import tokenizer_from_gguf

        return tokenizer_from_gguf(file)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer.json of a Hugging Face folder. Raises FileFormatError, NotFoundError."""
        from nomoat.text.tokenizer_json import tokenizer_from_folder

        return tokenizer_from_folder(folder)

    # -- text to ids ------------------------------------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = False,
        add_bos: bool | None = None,
        continues: bool = False,
        guard: str = "",
    ) -> list[int]:
        """Token ids of `text`.

        Control tokens written in the text ("<|im_end|>") are ordinary characters unless `parse_special`. BOS comes first if
        `add_bos` (default: as the model wants it, and never if the text `continues` another). `guard` is removed from plain text
        after control tokens have been found: who puts it inside a control string makes that an ordinary text.
        Raises InputError E_UTF8 for a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InputError(
                f"the text has a lone surrogate (U+{code:04X}) and cannot be written as UTF-8; replace or remove it",
                code="E_UTF8",
            ) from None
        wants_bos = (self.add_bos and not continues) if add_bos is None else add_bos
        ids = [self.bos_id] if wants_bos and self.bos_id is not None else []
        prefix = self._vocabulary.space_prefix
        spaced = prefix != SpacePrefix.NEVER and not continues
        for piece in self._cut(text, parse_special, guard):
            if isinstance(piece, int):
                ids.append(piece)
                spaced = prefix == SpacePrefix.PIECES
                continue
            if spaced and not (self._prefix_once and piece.startswith((" ", SPACE))):
                piece = " " + piece
            ids.extend(self._plain(piece))
            spaced = False
        return ids

    def _cut(self, text: str, control: bool, guard: str) -> Iterator[str | int]:
        """`text` as ids of added tokens and plain pieces. A guarded piece is searched again without guard, for user tokens."""
        for piece in self.added.split(text, control=control):
            if isinstance(piece, str) and guard and guard in piece:
                yield from self.added.split(piece.replace(guard, ""), control=False)
            else:
                yield piece

    # -- ids to text ------------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD. Raises InputError for an id outside the vocabulary."""
        from nomoat.text.stream import StreamDecoder

        decoder = StreamDecoder(self, skip_special=skip_special)
        return "".join([*map(decoder.push, ids), decoder.finish()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; b"" for control tokens. SentencePiece word starts keep their space."""
        return self.piece(token, skip_special=True)

    def piece(self, token: int, *, skip_special: bool) -> bytes:
        """As `token_bytes`, but without `skip_special` a control token gives its name."""
        if skip_special and self.is_special(token):
            return b""
        data = self._pieces.get(token)
        if data is None:
            data = self._pieces[token] = self._bytes(self._check(token))
        return data

    def is_special(self, token: int) -> bool:
        """True for control and unknown tokens, which have no text of their own."""
        return self._vocabulary.types[self._check(token)] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def token_text(self, token: int) -> str:
        """The token as the vocabulary stores it (`Ġhello`, `▁hello`, `<0x0A>`, `<|im_end|>`)."""
        return self._vocabulary.tokens[self._check(token)]

    def control_id(self, text: str) -> int | None:
        """The id of the control token written `text`, if there is one."""
        return next((t.id for t in self._vocabulary.added if t.control and t.content == text), None)

    def vocab_hash(self) -> str:
        """sha256 over the tokens and their types: equal for every quantization of one model."""
        digest = hashlib.sha256()
        for text, kind in zip(self._vocabulary.tokens, self._vocabulary.types, strict=True):
            data = text.encode()
            digest.update(b"%d %d " % (kind, len(data)) + data)
        return digest.hexdigest()

    def _check(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token id {token}: expected 0 to {self.vocab_size - 1}", code="E_RANGE")
        return token

    def _bytes(self, token: int) -> bytes:
        text, kind = self._vocabulary.tokens[token], self._vocabulary.types[token]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if not self._vocabulary.byte_level:
            return (text if kind == TokenType.CONTROL else text.replace(SPACE, " ")).encode()
        if kind == TokenType.NORMAL and all(c in BYTE_OF for c in text):
            return bytes(BYTE_OF[c] for c in text)
        return text.encode()


def library_encoder(built: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """`built` as Tokenizer's `plain`."""

    def encode(text: str) -> list[int]:
        ids: list[int] = built.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _byte_characters() -> dict[str, int]:
    """GPT-2's map of the 256 bytes to printable characters, inverted.

    Bytes that are printable in Latin-1 stand for themselves; the other 68 take U+0100, U+0101, ... in order.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_characters()
