"""tokenizer.json of Hugging Face folders: variants that must agree with the library, and bad ones (rows C13, C15)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nomoat.errors import InputError, ModelError, NotFoundError
from nomoat.text.pattern import check_pattern
from nomoat.text.pretokenizers import DIGITS, GPT2, NUMBERS, PRE_TOKENIZERS, PUNCTUATION
from nomoat.text.tokenizer import BYTE_OF, Tokenizer
from nomoat.text.tokenizer_json import template_source

Json = dict[str, Any]
BYTES = list(BYTE_OF)


def added_token(i: int, content: str, *, special: bool) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **flags}


def byte_level(**changes: Any) -> Json:
    """A byte-level tokenizer of 256 bytes, three merges and three added tokens."""
    vocab = {c: i for i, c in enumerate(BYTES)} | {"he": 256, "ll": 257, "hell": 258, "<e>": 259}
    added = [(259, "<e>", True), (260, "<b>", True), (261, "user", False)]
    root: Json = {
        "version": "1.0",
        "added_tokens": [added_token(i, c, special=s) for i, c, s in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l l", "he ll"]},
    }
    return root | changes


def sentencepiece(normalizer: Json | None, pre_tokenizer: Json | None) -> Json:
    """A vocabulary with byte fallback and `▁` for a space."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁a▁", "ab", "▁▁"]
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, texts[i], special=True) for i in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": [["▁", "a"], ["a", "b"], ["▁", "▁"]],
        },
    }


def save(folder: Path, root: Any, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


TEXTS = ["hello <b> hello", "a ab  a", "<s>a<s> a", " a", "", "user<e>user", "é\n\0🦙", "a </s>  b"]
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LAYOUTS: dict[str, Json] = {
    "byte level": byte_level(),
    "byte level with a space": byte_level(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "split": byte_level(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKENIZERS["qwen2"].steps[0]},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }
    ),
    "llama 2": sentencepiece({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "gemma": sentencepiece(
        REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    ),
    "phi 3": {
        **sentencepiece({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
        "added_tokens": [
            {**added_token(i, text, special=i != 2), "rstrip": i > 1} for i, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
    },
    "starcoder": byte_level(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    ),
    "deepseek": byte_level(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                *(
                    {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
                    for step in PRE_TOKENIZERS["deepseek-coder"].steps[:4]
                ),
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }
    ),
    "metaspace always": sentencepiece(
        None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    ),
    "metaspace first": sentencepiece(None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "metaspace never": sentencepiece(None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_the_library(tmp_path: Path, layout: str) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(LAYOUTS[layout]))
    ours = Tokenizer.from_folder(save(tmp_path, LAYOUTS[layout]))
    for text in TEXTS:
        assert ours.encode(text, parse_special=True, add_bos=False) == library.encode(text, add_special_tokens=False).ids, text


def test_names_come_from_the_configuration_files(tmp_path: Path) -> None:
    save(
        tmp_path,
        byte_level(),
        tokenizer_config={"bos_token": {"content": "<b>"}, "eos_token": "<e>", "add_bos_token": True},
        generation_config={"eos_token_id": [259, 261]},
        config={"eos_token_id": 256},
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (260, 259, frozenset({259, 261, 256}))
    assert tokenizer.encode("h") == [260, BYTES.index("h")]
    assert tokenizer.vocab_size == 262


def test_the_post_processor_says_whether_a_text_begins_with_bos(tmp_path: Path) -> None:
    save(tmp_path, LAYOUTS["llama 2"], tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert Tokenizer.from_folder(tmp_path).encode("a")[0] == 1
    save(tmp_path, byte_level(), tokenizer_config={"bos_token": "<b>"})
    assert not Tokenizer.from_folder(tmp_path).add_bos


def test_a_hidden_control_token_is_no_text(tmp_path: Path) -> None:
    """Even where the pre-tokenizer leaves its name whole and the model takes whole pieces from the vocabulary."""
    root = byte_level(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    root["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_folder(save(tmp_path, root))
    assert 259 not in tokenizer.encode("<e>")
    assert tokenizer.decode(tokenizer.encode("<e>")) == "<e>"


def test_every_end_of_a_folder_is_one(tmp_path: Path) -> None:
    """Llama 3.1's three ends of generation_config.json, an end by its text alone, and one that is not called special."""
    texts = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<tool_call>"]
    added = [added_token(300 + i, text, special=i < 3) for i, text in enumerate(texts)]
    save(tmp_path, byte_level(added_tokens=added), tokenizer_config={"eos_token": "<|eot_id|>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_id == 302
    assert tokenizer.eos_ids == {300, 301, 302, 303}
    assert tokenizer.is_special(303)
    assert not tokenizer.is_special(304)
    save(tmp_path, byte_level(added_tokens=added), tokenizer_config={}, generation_config={"eos_token_id": [302, 304]})
    assert Tokenizer.from_folder(tmp_path).eos_ids == {300, 301, 302, 303, 304}


def _with_added(*entries: Any) -> Json:
    return byte_level(added_tokens=list(entries))


def _with_pattern(regex: str) -> Json:
    return byte_level(pre_tokenizer={"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})


def _with_model(**changes: Any) -> Json:
    return byte_level(model=byte_level()["model"] | changes)


BAD: dict[str, tuple[Any, str]] = {
    "list": ([], "E_JSON"),
    "no model": (byte_level(model=None), "E_TYPE"),
    "unigram": (_with_model(type="Unigram"), "E_TOKENIZER"),
    "dropout": (_with_model(dropout=0.1), "E_TYPE"),
    "empty vocabulary": (_with_model(vocab={}), "E_TYPE"),
    "negative id": (_with_model(vocab={"a": -1}), "E_RANGE"),
    "huge id": (_with_model(vocab={"a": 1 << 40}), "E_RANGE"),
    "id is text": (_with_model(vocab={"a": "1"}), "E_RANGE"),
    "merges name unknown tokens": (_with_model(merges=["x yy"]), "E_TYPE"),
    "merges are numbers": (_with_model(merges=[1]), "E_TYPE"),
    "added: empty": (_with_added({"id": 300, "content": "", "special": True}), "E_TYPE"),
    "added: no id": (_with_added({"content": "<x>"}), "E_TYPE"),
    "added: huge id": (_with_added({"id": 1 << 30, "content": "<x>"}), "E_TYPE"),
    "added: twice": (_with_added(*[{"id": 300, "content": "<x>"}] * 2), "E_DUP"),
    "added: id of another token": (_with_added({"id": 5, "content": "<x>"}), "E_DUP"),
    "added: other id than in the vocabulary": (_with_added({"id": 300, "content": "he"}), "E_DUP"),
    "added: long": (_with_added({"id": 300, "content": "<" * 600}), "E_LIMIT"),
    "added: a million": (byte_level(added_tokens=[0] * 1_000_000), "E_LIMIT"),
    "unknown pre-tokenizer": (byte_level(pre_tokenizer={"type": "\x1b[31mX"}), "E_TYPE"),
    "unknown normalizer": (byte_level(normalizer={"type": "Precompiled"}), "E_TYPE"),
    "nested quantifiers": (_with_pattern("(a+)+"), "E_TYPE"),
    "nested stars": (_with_pattern("(.*)*"), "E_TYPE"),
    "long pattern": (_with_pattern("a" * 100_000), "E_LIMIT"),
    "back reference": (_with_pattern(r"(a)\1"), "E_TYPE"),
    "broken pattern": (_with_pattern("[[:nope:]]"), "E_TYPE"),
    "pattern in a normalizer": (
        byte_level(normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}),
        "E_TYPE",
    ),
    "steps of a wrong kind": (byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": 5}), "E_TYPE"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    root, code = BAD[name]
    save(tmp_path, root)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code == code
    assert "\x1b" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("data", [b"", b"{", b'{"model": ' + b"[" * 200_000, b'{"a": "\xff"}'])
def test_not_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code in ("E_JSON", "E_UTF8")


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"eos_token `<zz>` is not in the vocabulary"):
        Tokenizer.from_folder(save(tmp_path, byte_level(), tokenizer_config={"eos_token": "<zz>"}))
    for value in (-1, 1 << 40, "x", 1.5):
        with pytest.raises(InputError, match="eos_token_id"):
            Tokenizer.from_folder(save(tmp_path, byte_level(), tokenizer_config={}, generation_config={"eos_token_id": value}))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer.from_folder(save(tmp_path, _with_model(type="WordPiece")))


def test_patterns_of_the_table_are_accepted() -> None:
    patterns = {step for row in PRE_TOKENIZERS.values() for step in row.steps} - {DIGITS, NUMBERS, PUNCTUATION, GPT2}
    assert len(patterns) > 5
    for pattern in patterns:
        check_pattern(pattern)
        check_pattern(pattern + "|@{2,5}")  # by its form, not because it is known


GOOD = [r"\p{N}{1,3}", r"[^(\s|[.,!?…。，、।۔،])]+", r"(?:a|b+)?c", r"(?!\d)x", r"\x{4e00}+", ""]
UNSAFE = [
    "(a+)+",
    "(a*)*",
    "(?:a+b?)*",
    "((a+))+",
    "(a|b+)+",
    "(a+){2,}",
    "a+a+a+a+b",
    r"(a)\1",
    r"(?<n>a)\k<n>",
    "(?R)",
    r"\g<0>",
    "(?(1)a|b)",
    "a{1000}",
    "(a",
    "a)",
    "[a",
    "a++" * 4,
    "(a{2,}b)*",
    "(?#c)a",
    "a\\",
]


@pytest.mark.parametrize("pattern", GOOD)
def test_good_patterns(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", UNSAFE)
def test_unsafe_patterns(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        check_pattern(pattern)
    assert caught.value.code == "E_TYPE"


def test_checking_a_pattern_takes_no_time() -> None:
    for pattern in ("(" * 2000, "[" * 2000, "a?" * 1000, "(a)" * 600):
        begin = time.process_time()
        try:
            check_pattern(pattern)
        except InputError:
            pass
        assert time.process_time() - begin < 0.5


JUNK: list[Any] = [None, -1, "x", [1], [{}], {"type": []}, {"type": "Sequence"}]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes, of the vocabulary only the first two tokens."""
    if isinstance(value, dict):
        children = list(value.items())[: 2 if "he" in value or "▁a" in value else None]
    else:
        children = list(enumerate(value))[:3] if isinstance(value, list) else []
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


def _replaced(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(root))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


@pytest.mark.parametrize("layout", ["split", "llama 2", "metaspace first"])
def test_any_field_may_be_anything(tmp_path: Path, layout: str) -> None:
    """Junk in every place, one at a time: it loads, or it is one typed error."""
    refused = 0
    for path in _places(LAYOUTS[layout]):
        for junk in JUNK:
            try:
                Tokenizer.from_folder(save(tmp_path, _replaced(LAYOUTS[layout], path, junk))).encode("a b")
            except InputError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"])
def test_any_name_may_be_anything(tmp_path: Path, name: str) -> None:
    for key in ("bos_token", "eos_token", "eos_token_id", "add_bos_token", "chat_template"):
        for junk in JUNK:
            save(tmp_path, byte_level(), **{name: {key: junk}})
            try:
                Tokenizer.from_folder(tmp_path)
            except InputError as error:
                assert error.code in ("E_RANGE", "E_TYPE")  # noqa: PT017 - loading is right too
            assert isinstance(template_source(tmp_path), str | None)
