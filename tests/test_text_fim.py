"""Filling a gap: which tokens frame it, and the prompt that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from golden.make_family_ends import FAMILIES
from nomoat.errors import FileFormatError, InputError, ModelError
from nomoat.files.gguf import open_gguf
from nomoat.text.fim import Fim, fim_prompt
from nomoat.text.special import FIM_END_TEXTS
from nomoat.text.stream import StreamDecoder
from nomoat.text.tokenizer import Tokenizer
from test_text_json import byte_level, save
from vocabularies import write_vocabulary


def load(path: Path) -> Tokenizer:
    with open_gguf(path) as file:
        return Tokenizer.from_gguf(file)


def names(tokenizer: Tokenizer) -> list[str]:
    assert tokenizer.fim is not None
    return [tokenizer.token_text(i) for i in (tokenizer.fim.prefix, tokenizer.fim.suffix, tokenizer.fim.middle)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2.5-coder base", ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]),
        ("granite", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]),
        ("granite code, starcoder2", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]),
        ("deepseek-coder", ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]),
        ("codellama", ["▁<PRE>", "▁<SUF>", "▁<MID>"]),
    ],
)
def test_tokens_are_known_by_their_texts_or_keys(tmp_path: Path, family: str, expected: list[str]) -> None:
    tokenizer = load(FAMILIES[family].write(tmp_path / "family.gguf"))
    assert names(tokenizer) == expected
    assert tokenizer.fim is not None
    ends = {tokenizer.token_text(i) for i in tokenizer.fim.ends}
    assert set(expected) <= ends
    assert ends <= {*expected, *FIM_END_TEXTS}


def test_most_models_cannot(tmp_path: Path) -> None:
    for family in ("llama-3", "gemma", "phi3", "smollm2", "mistral tekken"):
        tokenizer = load(FAMILIES[family].write(tmp_path / "family.gguf"))
        assert tokenizer.fim is None
        with pytest.raises(ModelError, match=r"not taught to fill a gap.*<\|fim_prefix\|>") as caught:
            fim_prompt(tokenizer, "a", "b")
        assert caught.value.code == "E_FIM"


TOKENS = ["one", "two", "three", "pad", "a", "b", "ab"]


def written(folder: Path, **keys: Any) -> Path:
    return write_vocabulary(folder / "v.gguf", "gpt2", TOKENS, types=[3, 3, 3, 3, 1, 1, 1], merges=["a b"], pre="gpt-2", **keys)


def test_keys_win_new_ones_over_old_ones(tmp_path: Path) -> None:
    old = {"prefix_token_id": 2, "suffix_token_id": 1, "middle_token_id": 0}
    assert names(load(written(tmp_path, **old))) == ["three", "two", "one"]
    new = {"fim_pre_token_id": 0, "fim_suf_token_id": 1, "fim_mid_token_id": 2, "fim_pad_token_id": 3}
    tokenizer = load(written(tmp_path, **old, **new))
    assert tokenizer.fim == Fim(0, 1, 2, frozenset({0, 1, 2, 3}))
    assert load(written(tmp_path, fim_pre_token_id=0, fim_suf_token_id=1)).fim is None


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"fim_pre_token_id": 7}, "E_RANGE"),
        ({"middle_token_id": 4_000_000_000}, "E_RANGE"),
        ({"fim_sep_token_id": "x"}, "E_TYPE"),
        ({"fim_pre_token_id": True}, "E_TYPE"),
        ({"fim_pre_token_id": 0, "fim_suf_token_id": 0, "fim_mid_token_id": 1}, "E_DUP"),
    ],
)
def test_bad_keys(tmp_path: Path, keys: dict[str, Any], code: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        load(written(tmp_path, **keys))
    assert caught.value.code == code


def test_the_prompt_is_prefix_suffix_middle(tmp_path: Path) -> None:
    tokenizer = load(written(tmp_path, fim_pre_token_id=0, fim_suf_token_id=1, fim_mid_token_id=2))
    assert fim_prompt(tokenizer, "aba", "bb") == [0, 6, 4, 1, 5, 5, 2]
    assert fim_prompt(tokenizer, "", "") == [0, 1, 2]
    keys = {"fim_pre_token_id": 0, "fim_suf_token_id": 1, "fim_mid_token_id": 2, "bos_token_id": 3, "add_bos_token": True}
    assert fim_prompt(load(written(tmp_path, **keys)), "a", "b") == [3, 0, 4, 1, 5, 2]


def test_the_same_tokens_in_a_text_stay_text(tmp_path: Path) -> None:
    """Also in a folder, where Qwen's tokenizer.json does not call them special."""
    root = byte_level()
    named = [f"<|fim_{name}|>" for name in ("prefix", "suffix", "middle", "pad")]
    root["added_tokens"] += [{"id": 300 + i, "content": text, "special": False} for i, text in enumerate(named)]
    tokenizer = Tokenizer.from_folder(save(tmp_path, root))
    assert tokenizer.fim == Fim(300, 301, 302, frozenset({300, 301, 302, 303}))
    ids = fim_prompt(tokenizer, "print('<|fim_suffix|>')", "<|fim_middle|>")
    assert [i for i in ids if i >= 300] == [300, 301, 302]
    assert tokenizer.decode(ids) == "print('<|fim_suffix|>')<|fim_middle|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    assert Tokenizer.from_folder(tmp_path).fim is None


def test_what_fills_a_gap_keeps_its_first_space(tmp_path: Path) -> None:
    """Code Llama's vocabulary writes a space before any text; an answer of its own begins without it, a middle does not."""
    tokenizer = load(FAMILIES["codellama"].write(tmp_path / "family.gguf"))
    fim = tokenizer.fim
    assert fim is not None
    prefix, suffix, bos = tokenizer.encode("a", add_bos=False), tokenizer.encode("b", continues=True), tokenizer.bos_id
    assert len(prefix) == len(suffix) + 1
    assert fim_prompt(tokenizer, "a", "b") == [bos, fim.prefix, *prefix, fim.suffix, *suffix, fim.middle]
    for continues, text in ((False, "ab"), (True, " ab")):
        decoder = StreamDecoder(tokenizer, continues=continues)
        ids = tokenizer.encode(" ab", continues=True)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == text


def test_lone_surrogates_are_refused_in_both_texts(tmp_path: Path) -> None:
    tokenizer = load(written(tmp_path, fim_pre_token_id=0, fim_suf_token_id=1, fim_mid_token_id=2))
    for pair in (("\ud800", ""), ("", "\ud800")):
        with pytest.raises(InputError, match=r"U\+D800"):
            fim_prompt(tokenizer, *pair)


def test_a_real_engine_fills_a_gap(tmp_path: Path) -> None:
    pytest.importorskip("nomoat._native")
    from dataclasses import replace

    from nomoat.cli.fill import Filler
    from nomoat.engine.generate import Sampling, generate
    from nomoat.engine.model import Model
    from tiny import tiny_llama

    keys = {f"tokenizer.ggml.fim_{name}_token_id": i for i, name in enumerate(("pre", "suf", "mid"))}
    model = Model.load(tiny_llama(tmp_path / "model.gguf", metadata=keys))
    filler = Filler(model, Sampling(max_tokens=8))
    text = "".join(filler.fill("the ", " in"))
    prompt = fim_prompt(model.tokenizer, "the ", " in")
    (expected,) = generate(model, [prompt], Sampling(max_tokens=8, stop_tokens=frozenset({0, 1, 2}), continues=True))
    assert (text, filler.timing.tokens, filler.timing.prompt_tokens) == (expected.text, len(expected.tokens), len(prompt))
    with pytest.raises(InputError, match="leaves no room") as caught:
        list(Filler(model, replace(filler.sampling, max_tokens=1)).fill("a" * 300, ""))
    assert caught.value.code == "E_LIMIT"
