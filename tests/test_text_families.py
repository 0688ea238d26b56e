"""Model families: the ids that their own tokenizers give, the tokens that end their answers, their chat templates.

`golden/tokenizers.json` holds the parts of real vocabularies that the texts need; its script says where they come from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from golden import make_family_ends, make_family_templates, make_pretokenizers, make_tokenizers
from golden.make_family_ends import FAMILIES
from golden.make_tokenizers import CHECK, SEPARATOR
from nomoat.errors import TemplateError
from nomoat.files.gguf import open_gguf
from nomoat.text import pretokenizers
from nomoat.text.pretokenizers import PRE_TOKENIZERS
from nomoat.text.special import FIM_END_TEXTS
from nomoat.text.template import ChatTemplate
from nomoat.text.tokenizer import Tokenizer
from vocabularies import write_vocabulary

PARTS: dict[str, Any] = json.loads(make_tokenizers.FILE.read_text(encoding="utf-8"))
CUTS: dict[str, Any] = json.loads(make_pretokenizers.FILE.read_text(encoding="utf-8"))
ENDS: dict[str, list[str]] = json.loads(make_family_ends.FILE.read_text(encoding="utf-8"))
TEMPLATES: dict[str, dict[str, str]] = json.loads(make_family_templates.FILE.read_text(encoding="utf-8"))

#: row -> (vocabulary, what comes before the text, sha256 of the list of ids that the published tokenizer makes of CHECK:
#: llama.cpp's converter recognises pre-tokenizers by it, conversion/base.py)
PUBLISHED: dict[str, tuple[str, list[int], str]] = {
    "llama-bpe": ("llama-bpe", [128000], "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"),
    "smaug-bpe": ("llama-bpe", [], "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d"),
    "qwen2": ("qwen2", [], "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea"),
    "deepseek-r1-qwen": ("qwen2", [151646], "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5"),
    "refact": ("refact", [], "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff"),
    "falcon": ("falcon", [], "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed"),
    "tekken": ("tekken", [1], "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e"),
    "dbrx": ("dbrx", [], "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e"),
    "gpt-4o": ("gpt-4o", [], "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e"),
}
#: The same for whole vocabularies that are here.
PUBLISHED_WHOLE = {
    "gpt-2": ([], "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"),
    "starcoder": ([], "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34"),
    "deepseek-coder": ([32013], "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821"),
}
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


def load(path: Path) -> Tokenizer:
    with open_gguf(path) as file:
        return Tokenizer.from_gguf(file)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


class Part:
    """A tokenizer made of a part of a vocabulary, as a GGUF file; gives the ids of the whole."""

    def __init__(self, folder: Path, name: str, model: str, **keys: Any) -> None:
        rows = PARTS[name]["tokens"]
        path = write_vocabulary(
            folder / "part.gguf",
            model,
            [row[1] for row in rows],
            types=[row[3] for row in rows] if len(rows[0]) > 2 else None,
            scores=[row[2] for row in rows] if len(rows[0]) > 2 else None,
            merges=PARTS[name].get("merges"),
            **keys,
        )
        self.tokenizer = load(path)
        self.ids = [row[0] for row in rows]

    def encode(self, text: str, **options: Any) -> list[int]:
        return [self.ids[i] for i in self.tokenizer.encode(text, add_bos=False, **options)]


@pytest.mark.parametrize("row", PUBLISHED)
def test_ids_are_those_of_the_published_tokenizer(tmp_path: Path, row: str) -> None:
    name, start, expected = PUBLISHED[row]
    part = Part(tmp_path, name, "gpt2", pre=row)
    assert digest([*start, *part.encode(CHECK)]) == expected
    assert part.tokenizer.decode(part.tokenizer.encode(CHECK, add_bos=False)) == CHECK


@pytest.mark.parametrize("row", PUBLISHED_WHOLE)
def test_ids_of_whole_vocabularies_too(shared_data: Path, row: str) -> None:
    start, expected = PUBLISHED_WHOLE[row]
    tokenizer = load(shared_data / "llamacpp_vocabs" / f"ggml-vocab-{row}.gguf")
    assert digest([*start, *tokenizer.encode(CHECK, add_bos=False)]) == expected


def test_ids_of_smollm(shared_data: Path, smollm2: Path) -> None:
    assert digest(load(smollm2).encode(CHECK)) == SMOLLM
    assert digest(Tokenizer.from_folder(shared_data / "smollm_tokenizer").encode(CHECK)) == SMOLLM


@pytest.mark.parametrize("row", ["llama-bpe", "qwen2", "deepseek-r1-qwen"])
def test_vectors_of_llama_cpp_without_their_vocabulary(tmp_path: Path, shared_data: Path, row: str) -> None:
    part = Part(tmp_path, PUBLISHED[row][0], "gpt2", pre=row)
    source = shared_data / "llamacpp_vocabs" / f"ggml-vocab-{row}.gguf"
    texts = Path(f"{source}.inp").read_text(encoding="utf-8").split(SEPARATOR)
    lines = Path(f"{source}.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=True):
        assert part.encode(text) == [int(i) for i in line.split()], text


@pytest.mark.parametrize(
    ("name", "model", "keys"),
    [
        ("mistral-v1", "llama", {}),
        ("mistral-v3", "llama", {}),
        ("gemma-3", "llama", {"add_space_prefix": False}),
        ("gemma-4", "gemma4", {}),
    ],
)
def test_ids_of_sentencepiece_families(tmp_path: Path, shared_data: Path, name: str, model: str, keys: dict[str, Any]) -> None:
    part = Part(tmp_path, name, model, **keys)
    texts = make_tokenizers.texts(shared_data)
    for text, expected in zip(texts, PARTS[name]["ids"], strict=True):
        assert part.encode(text) == expected, text
        assert part.tokenizer.decode(part.tokenizer.encode(text, add_bos=False)) == text


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_a_suffix_gets_no_space(tmp_path: Path, name: str) -> None:
    """Code Llama's rule, by its publisher's own method on the `sentencepiece` library."""
    part = Part(tmp_path, name, "llama")
    for (prefix, suffix), (first, second) in zip(make_tokenizers.GAPS, PARTS[name]["gaps"], strict=True):
        assert part.encode(prefix) == first
        assert part.encode(suffix, continues=True) == second


@pytest.mark.parametrize("row", CUTS["pieces"])
def test_texts_are_cut_as_published(row: str) -> None:
    cutter = pretokenizers.build(PRE_TOKENIZERS[row])
    for text, lengths in zip(make_pretokenizers.TEXTS, CUTS["pieces"][row], strict=True):
        assert [end - begin for _, (begin, end) in cutter.pre_tokenize_str(text)] == lengths, text


def test_every_row_has_a_vector() -> None:
    seen = {*PUBLISHED, *PUBLISHED_WHOLE, *CUTS["pieces"]}
    same = {name for name, spec in PRE_TOKENIZERS.items() if any(spec is PRE_TOKENIZERS[row] for row in seen)}
    assert same == set(PRE_TOKENIZERS)
    # where the other implementation differs from the publishers' expressions: combining marks, and `ſ` in a contraction
    assert set(CUTS["llama_cpp_differs"]) == {"tekken", "gpt-4o", "deepseek-coder"}


def test_qwen_normalizes_text_and_llama_does_not(tmp_path: Path) -> None:
    for name, survives in (("qwen2", False), ("llama-bpe", True)):
        tokenizer = Part(tmp_path, name, "gpt2", pre=name).tokenizer
        assert (tokenizer.decode(tokenizer.encode("e\u0301", add_bos=False)) == "e\u0301") is survives


# ---- what ends an answer

#: What only one of the two counts as an end. llama.cpp ends every answer at tokens that only follow a filled gap; and it takes
#: `</s>` for an end where it is a piece of HTML.
HTML = {"qwen2, qwen3": {"</s>"}, "gemma": {"</s>"}}
OURS = {"deepseek-r1-distill-qwen": {"<|EOT|>"}, "deepseek-coder": {"<|EOT|>"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_llama_cpp_stops(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = load(family.write(tmp_path / "family.gguf"))
    found = {tokenizer.token_text(i) for i in tokenizer.eos_ids}
    assert found == set(ENDS[name]) - FIM_END_TEXTS - HTML.get(name, set()) | OURS.get(name, set())
    assert tokenizer.eos_id is not None
    assert tokenizer.token_text(tokenizer.eos_id) == family.ids["eos"]
    assert all(tokenizer.is_special(i) for i in tokenizer.eos_ids)


def test_an_end_that_the_file_calls_text_is_never_text(tmp_path: Path) -> None:
    tokenizer = load(FAMILIES["yi chat"].write(tmp_path / "family.gguf"))
    end = tokenizer.control_id("<|im_end|>")
    assert end is not None
    assert end not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.encode("<|im_end|>", parse_special=True, add_bos=False) == [end]
    assert tokenizer.token_bytes(end) == b""


def test_answers_of_several_messages_end_at_the_last(tmp_path: Path) -> None:
    tokens = ["<|end|>", "<|return|>", "<|call|>", "a", "b", "ab"]
    types = [3, 3, 3, 1, 1, 1]
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, types=types, merges=["a b"], pre="gpt-2", eos_token_id=1)
    assert load(path).eos_ids == {1, 2}


def test_phi3_tokens_swallow_the_line_break_behind_them(tmp_path: Path) -> None:
    """The flag `rstrip` of its tokenizer.json, which a GGUF file cannot hold; without the line breaks, as it was taught."""
    tokenizer = load(FAMILIES["phi3"].write(tmp_path / "family.gguf"))

    def texts(text: str) -> list[str]:
        return [tokenizer.token_text(i) for i in tokenizer.encode(text, parse_special=True, add_bos=False)]

    assert texts("<|user|>\n a<|end|>\n<|assistant|>\n") == ["<|user|>", "▁", "a", "<|end|>", "<|assistant|>"]
    assert texts("<|endoftext|>\n") == ["<|endoftext|>", "▁", "<0x0A>"]
    other = load(FAMILIES["llama-2, mistral, mixtral, tinyllama"].write(tmp_path / "other.gguf"))
    assert len(other.encode("</s>\n", parse_special=True, add_bos=False)) == 3


# ---- SentencePiece vocabularies that lack something


def spm(folder: Path, tokens: list[str], types: list[int] | None = None) -> Tokenizer:
    scores = [-float(i) for i in range(len(tokens))]
    return load(write_vocabulary(folder / "spm.gguf", "llama", tokens, types=types, scores=scores, add_space_prefix=False))


def test_a_character_without_bytes_is_unknown_or_an_error(tmp_path: Path) -> None:
    from nomoat.errors import InputError

    assert spm(tmp_path, ["<unk>", "a"], [2, 1]).encode("aéa", add_bos=False) == [1, 0, 1]
    with pytest.raises(InputError, match=r"cannot write U\+00E9") as caught:
        spm(tmp_path, ["a"]).encode("aé", add_bos=False)
    assert caught.value.code == "E_TOKENIZER"


def test_a_token_may_hold_a_space_inside(tmp_path: Path) -> None:
    """Gemma has one, `>▁</`; words must not be cut apart there."""
    tokenizer = spm(tmp_path, [">▁<", ">▁", "▁<", "▁", ">", "<", "a"])
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a> <a <", add_bos=False)] == ["a", ">▁<", "a", "▁<"]


def test_the_text_of_a_byte_token_is_not_that_byte(tmp_path: Path) -> None:
    letters = sorted(set("<0x41>"))
    tokenizer = spm(tmp_path, ["<0x41>", "<0x41", "<0x4", "<0x", "<0", *letters], [6, *[1] * (4 + len(letters))])
    assert tokenizer.decode(tokenizer.encode("<0x41>", add_bos=False)) == "<0x41>"


def test_many_words_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nomoat.text import sentencepiece

    monkeypatch.setattr(sentencepiece, "MAX_WORDS", 10)
    tokenizer = spm(tmp_path, ["a", "b", "▁"])
    text = " ".join(format(n, "b").replace("0", "a").replace("1", "b") for n in range(200))
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


# ---- chat templates


def test_the_golden_holds_every_family() -> None:
    assert {name: set(cases) for name, cases in TEMPLATES.items()} == {
        name: set(make_family_templates.CASES) for name in make_family_templates.FAMILIES
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_family_templates_render_as_apply_chat_template_does(shared_data: Path, name: str) -> None:
    bos, eos = make_family_templates.FAMILIES[name]
    source = (shared_data / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, bos_token=bos or "", eos_token=eos, seconds=10)
    for title, case in make_family_templates.CASES.items():
        expected = TEMPLATES[name][title]
        if expected.startswith("error"):
            assert name == "google-gemma-2-2b-it"  # it has no system role and no tools, and says so
            with pytest.raises(TemplateError, match=r"System role not supported|roles must alternate"):
                template.render(case.messages, tools=case.tools, add_generation_prompt=case.prompt, **case.variables)
            continue
        text = template.render(case.messages, tools=case.tools, add_generation_prompt=case.prompt, **case.variables)
        assert hashlib.sha256(text.encode()).hexdigest() == expected, title
