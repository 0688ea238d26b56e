"""tokenizer.json of a Hugging Face folder: checked, and stripped of what nomoat does itself.

Added tokens are found by `added.py` and spaces are put before text by `Tokenizer`, so that control strings in plain text stay
plain and a text can be continued; both are taken out of the file before the `tokenizers` library sees it. What remains runs
there: normalizer, pre-tokenizer, merges. Its regular expressions run on a backtracking engine, hence `pattern.py`.

Added tokens are looked for in the text as given: their flag `normalized` is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nomoat.errors import FileFormatError, InputError, ModelError, NotFoundError, printable
from nomoat.text.added import MAX_ADDED, AddedToken
from nomoat.text.fim import find_fim
from nomoat.text.gguf_vocab import BYTE_TOKEN, MAX_TOKENS
from nomoat.text.pattern import check_pattern
from nomoat.text.special import CONTROL_TEXTS, end_ids
from nomoat.text.tokenizer import SPACE, SpacePrefix, Tokenizer, TokenType, Vocabulary, library_encoder

MAX_BYTES = 64 << 20
_NORMALIZERS = {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"}
_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Metaspace", "Whitespace", "WhitespaceSplit"}
Json = dict[str, Any]


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """See `Tokenizer.from_folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"{printable(str(folder))} has no tokenizer.json;"
            " `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of transformers writes one"
        )
    root = _read(path)
    model = _object(path, root, "model")
    if model.get("type", "BPE") != "BPE":
        kind = printable(str(model["type"])[:40])
        raise ModelError(f"{printable(str(path))}: tokenizer model `{kind}`: nomoat knows BPE", code="E_TOKENIZER")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        _fail(path, "E_TYPE", "model: subword prefix, word suffix and dropout are not supported")
    vocab = _vocab(path, model)
    added = _added(path, root, vocab)
    _check_steps(path, root.get("normalizer"), _NORMALIZERS, "normalizer")
    _check_steps(path, root.get("pre_tokenizer"), _PRE_TOKENIZERS, "pre_tokenizer")
    byte_level = any(step.get("type") == "ByteLevel" for key in ("pre_tokenizer", "decoder") for step in _steps(root.get(key)))
    prefix, once = _take_space_prefix(root)
    tokens, types = _tokens(vocab, added, model, byte_level)
    names = _names(folder)
    ids = {**vocab, **{token.content: token.id for token in added}}
    bos = _named_id(path, names, ids, "bos")
    ends = _end_ids(folder, path, names, ids, len(tokens))
    vocabulary = Vocabulary(
        tokens=tokens,
        types=types,
        byte_level=byte_level,
        added=added,
        bos_id=bos,
        eos_id=ends[0] if ends else None,
        eos_ids=frozenset(ends) | end_ids({token.content: token.id for token in added if token.control}),
        add_bos=bool(names.get("add_bos_token", _puts_first(root, bos))) and bos is not None,
        space_prefix=prefix,
        fim=find_fim({token.content: token.id for token in added}),
    )
    hidden = {token.content for token in added if token.control}
    model["vocab"] = {text: i for text, i in vocab.items() if text not in hidden or text == model.get("unk_token")}
    root.update(added_tokens=[], post_processor=None, decoder=None, truncation=None, padding=None)
    return _build(path, root, vocabulary, once)


def template_source(folder: Path) -> str | None:
    """The folder's chat template; None if it has none. Raises FileFormatError."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    template = _names(folder).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _build(path: Path, root: Json, vocabulary: Vocabulary, once: bool) -> Tokenizer:
    import tokenizers

    try:
        plain = tokenizers.Tokenizer.from_str(json.dumps(root))
    except Exception as error:  # the library raises bare Exception
        _fail(path, "E_TYPE", f"the tokenizers library refuses it: {printable(str(error)[:300])}")
    try:
        return Tokenizer(vocabulary, library_encoder(plain), prefix_once=once)
    except InputError as error:
        raise FileFormatError(str(error), code=error.code, path=path) from None


def _vocab(path: Path, model: Json) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        _fail(path, "E_TYPE", "model.vocab: expected an object of tokens and ids")
    if len(vocab) > MAX_TOKENS:
        _fail(path, "E_LIMIT", f"model.vocab has {len(vocab):,} tokens: expected at most {MAX_TOKENS:,}")
    for text, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_TOKENS:
            _fail(path, "E_RANGE", f"model.vocab: token `{printable(text[:40])}` has id {printable(str(i)[:40])}")
    return vocab


def _added(path: Path, root: Json, vocab: dict[str, int]) -> tuple[AddedToken, ...]:
    entries = root.get("added_tokens") or []
    if not isinstance(entries, list) or len(entries) > MAX_ADDED:
        _fail(path, "E_LIMIT", f"added_tokens: expected a list of at most {MAX_ADDED:,}")
    by_id = {i: text for text, i in vocab.items()}
    seen: set[str] = set()
    tokens = []
    for n, entry in enumerate(entries):
        content, i = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(content, str) or not content or type(i) is not int or not 0 <= i < MAX_TOKENS:
            _fail(path, "E_TYPE", f"added_tokens[{n}]: expected a text and an id from 0 to {MAX_TOKENS - 1}")
        if content in seen or by_id.get(i, content) != content or vocab.get(content, i) != i:
            _fail(path, "E_DUP", f"added_tokens[{n}]: `{printable(content[:40])}` or its id {i} is already taken")
        seen.add(content)
        by_id[i] = content
        flags = {name: entry.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
        tokens.append(AddedToken(i, content, control=entry.get("special") is True or content in CONTROL_TEXTS, **flags))
    return tuple(tokens)


def _tokens(vocab: dict[str, int], added: tuple[AddedToken, ...], model: Json, byte_level: bool) -> tuple[list[str], bytes]:
    """Texts and types by id; ids that the file leaves out are unused and empty."""
    ids = [*vocab.values(), *(token.id for token in added)]
    texts = [""] * (max(ids) + 1)
    types = bytearray([TokenType.UNUSED]) * len(texts)
    fallback = not byte_level and bool(model.get("byte_fallback"))
    for text, i in vocab.items():
        texts[i] = text
        types[i] = TokenType.BYTE if fallback and BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
    for token in added:
        texts[token.id] = token.content
        types[token.id] = TokenType.CONTROL if token.control else TokenType.USER_DEFINED
    unknown = model.get("unk_token")
    if not byte_level and isinstance(unknown, str) and unknown in vocab:
        types[vocab[unknown]] = TokenType.UNKNOWN
    return texts, bytes(types)


def _take_space_prefix(root: Json) -> tuple[SpacePrefix, bool]:
    """Remove from `root` what puts a space before text; returns where it was put, and whether only if there was none."""
    normalizer = root.get("normalizer")
    if isinstance(normalizer, dict):
        steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
        kept = [step for step in steps if not (step.get("type") == "Prepend" and step.get("prepend") == SPACE)]
        if len(kept) < len(steps):
            root["normalizer"] = {"type": "Sequence", "normalizers": kept}
            return SpacePrefix.PIECES, False
    for step in _steps(root.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"
            return {"always": SpacePrefix.PIECES, "first": SpacePrefix.START}.get(str(scheme), SpacePrefix.NEVER), True
    sole = root.get("pre_tokenizer")
    if isinstance(sole, dict) and sole.get("type") == "ByteLevel" and sole.get("add_prefix_space"):
        sole["add_prefix_space"] = False
        return SpacePrefix.PIECES, True
    return SpacePrefix.NEVER, False


def _steps(step: Any) -> Iterator[Json]:
    """The steps of a normalizer, pre-tokenizer or decoder, with sequences opened."""
    stack = [step]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            for key in ("normalizers", "pretokenizers", "decoders"):
                stack.extend(reversed(item[key]) if isinstance(item.get(key), list) else [])


def _check_steps(path: Path, root: Any, known: set[str], where: str) -> None:
    if root is not None and not isinstance(root, dict):
        _fail(path, "E_TYPE", f"{where}: expected an object")
    for step in _steps(root):
        kind = step.get("type")
        children = step.get("normalizers", step.get("pretokenizers", []))
        if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
            _fail(path, "E_TYPE", f"{where}: a sequence has a step that is not an object")
        if not isinstance(kind, str) or kind not in known:
            _fail(path, "E_TYPE", f"{where}: `{printable(str(kind)[:40])}` is not known (known: {', '.join(sorted(known))})")
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            try:
                check_pattern(pattern["Regex"])
            except InputError as error:
                _fail(path, error.code, f"{where}: {error}")
        for key in ("pattern", "content", "prepend"):
            if len(str(step.get(key) or "")) > 4096:
                _fail(path, "E_LIMIT", f"{where}: `{key}` of {kind} is longer than 4,096 characters")


def _puts_first(root: Json, bos: int | None) -> bool:
    """Does the post-processor start a text with BOS?"""
    stack, found = [root.get("post_processor")], False
    while stack:
        item = stack.pop()
        if not isinstance(item, dict):
            continue
        stack.extend(item["processors"] if isinstance(item.get("processors"), list) else [])
        single = item.get("single")
        first = single[0].get("SpecialToken") if isinstance(single, list) and single and isinstance(single[0], dict) else None
        special = item.get("special_tokens")
        if isinstance(first, dict) and isinstance(special, dict):
            entry = special.get(str(first.get("id")))
            found |= isinstance(entry, dict) and entry.get("ids") == [bos]
    return found


def _names(folder: Path) -> Json:
    """tokenizer_config.json over special_tokens_map.json; empty if neither is there."""
    merged: Json = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            merged.update({key: value for key, value in _read(folder / name).items() if value is not None})
    return merged


def _named_id(path: Path, names: Json, ids: dict[str, int], name: str) -> int | None:
    value = names.get(f"{name}_token")
    content = value.get("content") if isinstance(value, dict) else value
    if content is None:
        return None
    if not isinstance(content, str) or content not in ids:
        _fail(
            path.parent / "tokenizer_config.json",
            "E_RANGE",
            f"{name}_token `{printable(str(content)[:40])}` is not in the vocabulary",
        )
    return ids[content]


def _end_ids(folder: Path, path: Path, names: Json, ids: dict[str, int], count: int) -> list[int]:
    """eos of tokenizer_config.json first, then those of generation_config.json and config.json."""
    named = _named_id(path, names, ids, "eos")
    ends = [] if named is None else [named]
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = _read(file).get("eos_token_id") if file.is_file() else None
        for i in value if isinstance(value, list) else [] if value is None else [value]:
            if type(i) is not int or not 0 <= i < MAX_TOKENS:
                _fail(file, "E_RANGE", f"eos_token_id is {printable(str(i)[:40])}: expected an id of the vocabulary")
            if i not in ends and i < count:  # config.json may speak of padded rows that no token uses
                ends.append(i)
    return ends


def _object(path: Path, root: Json, key: str) -> Json:
    value = root.get(key)
    if not isinstance(value, dict):
        _fail(path, "E_TYPE", f"`{key}`: expected an object")
    return value


def _read(path: Path) -> Json:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        _fail(path, "E_JSON", f"not valid JSON: {printable(str(error)[:200])}")
    if not isinstance(value, dict):
        _fail(path, "E_JSON", "expected a JSON object")
    return value


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        _fail(path, "E_LIMIT", f"larger than {MAX_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError("not valid UTF-8", code="E_UTF8", path=path, offset=error.start) from None


def _fail(path: Path, code: str, message: str) -> NoReturn:
    raise FileFormatError(message, code=code, path=path)
