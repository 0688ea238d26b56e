"""The tokenizer inside a GGUF file: `tokenizer.ggml.*`, checked, then built."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

from nomoat.errors import FileFormatError, InputError, ModelError, printable
from nomoat.text import pretokenizers, sentencepiece
from nomoat.text.added import AddedToken
from nomoat.text.tokenizer import SpacePrefix, Tokenizer, TokenType, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tokenizers

    from nomoat.files.gguf import GgufFile, LazyArray

MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 21
MAX_TOKEN_CHARS = 1 << 14

# Files name one id that ends an answer but chat models stop at several. These texts end one in every model that has them
# as control tokens.
END_TEXTS = frozenset(
    ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>",
     "<end_of_turn>", "<eos>", "<EOT>", "<|EOT|>", "<|end_of_turn|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>")
)  # fmt: skip

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    model = file.get_str("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"tokenizer kind `{printable(model[:80])}` (tokenizer.ggml.model):"
            " nomoat knows gpt2 (byte-level BPE) and llama (SentencePiece)",
            code="E_TOKENIZER",
        )
    byte_level = model == "gpt2"
    tokens, types = _tokens(file)
    pre = pretokenizers.pre_tokenizer_spec(file.get_str("tokenizer.ggml.pre", default="(none)")) if byte_level else None
    added = tuple(
        AddedToken(i, tokens[i], control=types[i] == TokenType.CONTROL)
        for i in _of_type(types, TokenType.CONTROL, TokenType.USER_DEFINED)
        if tokens[i]
    )
    spaced = not byte_level and file.get_bool("tokenizer.ggml.add_space_prefix", default=True)
    vocabulary = Vocabulary(
        tokens=tokens,
        types=types,
        byte_level=byte_level,
        added=added,
        bos_id=_id(file, "bos", len(tokens)),
        eos_id=_id(file, "eos", len(tokens)),
        eos_ids=_end_ids(file, added, len(tokens)),
        add_bos=file.get_bool("tokenizer.ggml.add_bos_token", default=pre.add_bos if pre else True),
        space_prefix=SpacePrefix.PIECES if spaced else SpacePrefix.NEVER,
    )
    try:
        if pre is not None:
            return Tokenizer(vocabulary, _byte_level_bpe(file, vocabulary, pre))
        return Tokenizer(vocabulary, _sentencepiece(file, vocabulary))
    except InputError as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(str(error), code=error.code, path=file.path) from None


def _byte_level_bpe(file: GgufFile, vocabulary: Vocabulary, pre: pretokenizers.PreTokenizerSpec) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import normalizers

    merges: list[Any] = [tuple(text.split(" ")) for text in _strings(file, "merges", MAX_MERGES)]
    wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        _fail(file, "E_TYPE", f"tokenizer.ggml.merges[{wrong}] is not two tokens with one space between them")
    ids = _ids(vocabulary)
    try:
        model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_tokens)
    except Exception as error:  # the library raises bare Exception
        _fail(file, "E_TYPE", f"tokenizer.ggml.merges does not fit the vocabulary: {printable(str(error)[:200])}")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pretokenizers.build(pre)
    if pre.nfc:
        built.normalizer = normalizers.NFC()
    return built


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    scores = _numbers(file, "scores", len(vocabulary.tokens))
    if scores is None:
        _fail(file, "E_MISSING", "tokenizer.ggml.scores is missing: a SentencePiece vocabulary needs it")
    if not bool((scores == scores).all()):
        _fail(file, "E_NONFINITE", "tokenizer.ggml.scores has a NaN")
    return sentencepiece.build(_ids(vocabulary), scores)


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens that plain text may turn into: all but the control tokens, and of equal texts the last, as llama.cpp does."""
    tokens = vocabulary.tokens
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    for i in _of_type(vocabulary.types, TokenType.CONTROL, TokenType.UNKNOWN):
        if ids.get(tokens[i]) == i:
            del ids[tokens[i]]
    return ids


def _of_type(types: bytes, *kinds: TokenType) -> list[int]:
    """Ids of the tokens of these types, ascending."""
    return [match.start() for match in re.finditer(b"[%s]" % bytes(kinds), types)]


def _tokens(file: GgufFile) -> tuple[list[str], bytes]:
    """Texts and types, of equal length. Raises FileFormatError."""
    tokens = _strings(file, "tokens", MAX_TOKENS)
    if not tokens:
        _fail(file, "E_LIMIT", "tokenizer.ggml.tokens is empty")
    numbers = _numbers(file, "token_type", len(tokens))
    if numbers is None:
        types = bytes([TokenType.NORMAL]) * len(tokens)
    else:
        unknown = set(numbers.tolist()) - set(TokenType)
        if unknown:
            _fail(file, "E_TYPE", f"tokenizer.ggml.token_type has {unknown.pop()}: expected 0 to {max(TokenType)}")
        types = bytes(numbers.astype("uint8"))
    if max(map(len, tokens)) > MAX_TOKEN_CHARS:
        longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
        _fail(file, "E_LIMIT", f"token {longest} has {len(tokens[longest]):,} characters: expected at most {MAX_TOKEN_CHARS:,}")
    empty = next((i for i, text in enumerate(tokens) if not text and types[i] == TokenType.NORMAL), None)
    if empty is not None:
        _fail(file, "E_TYPE", f"token {empty} is empty")
    seen: set[int] = set()
    for i in _of_type(types, TokenType.BYTE):
        if not BYTE_TOKEN.fullmatch(tokens[i]):
            _fail(file, "E_TYPE", f"byte token {i} is `{printable(tokens[i][:20])}`: expected <0x00> to <0xFF>")
        value = int(tokens[i][3:5], 16)
        if value in seen:
            _fail(file, "E_DUP", f"byte token {i} (`{tokens[i]}`) occurs twice")
        seen.add(value)
    return tokens, types


def _end_ids(file: GgufFile, added: tuple[AddedToken, ...], count: int) -> frozenset[int]:
    named = (_id(file, key, count) for key in ("eos", "eot", "eom"))
    known = (token.id for token in added if token.control and token.content in END_TEXTS)
    return frozenset([*(i for i in named if i is not None), *known])


def _id(file: GgufFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    value = file.get_int(key)
    if not 0 <= value < count:
        _fail(file, "E_RANGE", f"{key} is {value}: expected 0 to {count - 1}")
    return value


def _strings(file: GgufFile, name: str, limit: int) -> list[str]:
    array = _array(file, name)
    if array is None:
        _fail(file, "E_MISSING", f"tokenizer.ggml.{name} is missing")
    if len(array) > limit:
        _fail(file, "E_LIMIT", f"tokenizer.ggml.{name} has {len(array):,} entries: expected at most {limit:,}")
    return array.strings()


def _numbers(file: GgufFile, name: str, count: int) -> npt.NDArray[np.generic] | None:
    array = _array(file, name)
    if array is None:
        return None
    if len(array) != count:
        _fail(file, "E_SHAPE", f"tokenizer.ggml.{name} has {len(array):,} entries for {count:,} tokens")
    return array.numbers()


def _array(file: GgufFile, name: str) -> LazyArray | None:
    key = f"tokenizer.ggml.{name}"
    return file.get_array(key) if key in file.metadata else None


def _fail(file: GgufFile, code: str, message: str) -> NoReturn:
    raise FileFormatError(message, code=code, path=file.path)
