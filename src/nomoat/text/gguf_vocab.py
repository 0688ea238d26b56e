"""The tokenizer inside a GGUF file: `tokenizer.ggml.*`, checked, then built."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

from nomoat.errors import FileFormatError, InputError, ModelError, printable
from nomoat.text import pretokenizers, sentencepiece
from nomoat.text.added import AddedToken
from nomoat.text.fim import Fim, find_fim
from nomoat.text.special import CONTROL_TEXTS, end_ids
from nomoat.text.tokenizer import SPACE, SpacePrefix, Tokenizer, TokenType, Vocabulary, library_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from nomoat.files.gguf import GgufFile, LazyArray

MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 21
MAX_TOKEN_CHARS = 1 << 14

#: `tokenizer.ggml.model`
KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "gemma4": "BPE of characters"}
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    model = file.get_str("tokenizer.ggml.model")
    if model not in KINDS:
        kinds = ", ".join(f"{name} ({what})" for name, what in KINDS.items())
        raise ModelError(
            f"tokenizer kind `{printable(model[:80])}` (tokenizer.ggml.model): nomoat knows {kinds}", code="E_TOKENIZER"
        )
    tokens, types = _tokens(file)
    pre = pretokenizers.pre_tokenizer_spec(file.get_str("tokenizer.ggml.pre", default="(none)")) if model == "gpt2" else None
    added = _added(tokens, types)
    by_text = {token.content: token.id for token in added}
    ends = [_id(file, key, len(tokens)) for key in ("eos", "eot", "eom")]
    spaced = file.get_bool("tokenizer.ggml.add_space_prefix", default=model == "llama") and model != "gpt2"
    vocabulary = Vocabulary(
        tokens=tokens,
        types=types,
        byte_level=model == "gpt2",
        added=added,
        bos_id=_id(file, "bos", len(tokens)),
        eos_id=ends[0],
        eos_ids=frozenset(i for i in ends if i is not None) | end_ids({t.content: t.id for t in added if t.control}),
        add_bos=file.get_bool("tokenizer.ggml.add_bos_token", default=pre.add_bos if pre else True),
        space_prefix=SpacePrefix.PIECES if spaced else SpacePrefix.NEVER,
        fim=_fim(file, by_text, len(tokens)),
    )
    try:
        if model == "llama":
            return Tokenizer(vocabulary, _sentencepiece(file, vocabulary))
        return Tokenizer(vocabulary, _bpe(file, vocabulary, pre))
    except InputError as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(str(error), code=error.code, path=file.path) from None


def _bpe(file: GgufFile, vocabulary: Vocabulary, pre: pretokenizers.PreTokenizerSpec | None) -> Callable[[str], list[int]]:
    """Merges over bytes, cut by `pre`; without it over characters, spaces written as SPACE, as Gemma 4 has them."""
    import tokenizers
    from tokenizers import normalizers

    merges: list[Any] = [tuple(text.split(" ")) for text in _strings(file, "merges", MAX_MERGES)]
    wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        _fail(file, "E_TYPE", f"tokenizer.ggml.merges[{wrong}] is not two tokens with one space between them")
    ids = _ids(vocabulary)
    whole = pre is not None and pre.whole_tokens
    try:
        model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=whole, byte_fallback=pre is None)
    except Exception as error:  # the library raises bare Exception
        _fail(file, "E_TYPE", f"tokenizer.ggml.merges does not fit the vocabulary: {printable(str(error)[:200])}")
    built = tokenizers.Tokenizer(model)
    if pre is None:
        built.normalizer = normalizers.Replace(" ", SPACE)
    else:
        built.pre_tokenizer = pretokenizers.build(pre)
        if pre.nfc:
            built.normalizer = normalizers.NFC()
    return library_encoder(built)


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    scores = _numbers(file, "scores", len(vocabulary.tokens))
    if scores is None:
        _fail(file, "E_MISSING", "tokenizer.ggml.scores is missing: a SentencePiece vocabulary needs it")
    if not bool((scores == scores).all()):
        _fail(file, "E_NONFINITE", "tokenizer.ggml.scores has a NaN")
    tokens, types = vocabulary.tokens, vocabulary.types
    bytes_ = {int(tokens[i][3:5], 16): i for i in _of_type(types, TokenType.BYTE)}
    unknown = next(iter(_of_type(types, TokenType.UNKNOWN)), None)
    return sentencepiece.encoder(_ids(vocabulary, TokenType.BYTE), scores.tolist(), bytes_, unknown)


def _ids(vocabulary: Vocabulary, *besides: TokenType) -> dict[str, int]:
    """Tokens that plain text may turn into: all but the control tokens, and of equal texts the last, as llama.cpp does."""
    tokens = vocabulary.tokens
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    for i in _of_type(vocabulary.types, TokenType.CONTROL, TokenType.UNKNOWN, *besides):
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
    named = bytearray(types)
    for i, text in enumerate(tokens):
        if text in CONTROL_TEXTS:
            named[i] = TokenType.CONTROL
    return tokens, bytes(named)


def _added(tokens: list[str], types: bytes) -> tuple[AddedToken, ...]:
    """Control tokens and tokens that were added to the vocabulary, with the white space they swallow."""
    ids = [i for i in _of_type(types, TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED) if tokens[i]]
    # Phi-3's special tokens swallow the line break behind them. Its tokenizer.json says so; a GGUF file has no place for it.
    swallow = any(tokens[i] == "<|placeholder1|>" for i in ids)
    kept = ("<unk>", "<s>", "<|endoftext|>")
    return tuple(
        AddedToken(i, tokens[i], control=types[i] != TokenType.USER_DEFINED, rstrip=swallow and tokens[i] not in kept)
        for i in ids
    )


def _fim(file: GgufFile, added: dict[str, int], count: int) -> Fim | None:
    """By the file's keys, present and former (`prefix_token_id`), else by the texts of the tokens."""
    prefix, suffix, middle = (
        new if (new := _id(file, f"fim_{key[:3]}", count)) is not None else _id(file, key, count)
        for key in ("prefix", "suffix", "middle")
    )
    after = (_id(file, key, count) for key in ("fim_pad", "fim_rep", "fim_sep"))
    fim = find_fim(added, named=(prefix, suffix, middle), ends=[i for i in after if i is not None])
    if fim is not None and len({fim.prefix, fim.suffix, fim.middle}) < 3:
        _fail(file, "E_DUP", f"the tokens for filling a gap are {fim.prefix}, {fim.suffix} and {fim.middle}: they must differ")
    return fim


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
