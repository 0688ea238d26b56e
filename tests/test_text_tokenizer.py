"""Tokenizers against the vectors of llama.cpp, a real tokenizer.json, and a plain implementation of the SentencePiece merges."""

from __future__ import annotations

import heapq
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomoat.errors import InputError, ModelError
from nomoat.files.gguf import open_gguf
from nomoat.text import pretokenizers
from nomoat.text.added import AddedToken, AddedTokens
from nomoat.text.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


def load(path: Path) -> Tokenizer:
    with open_gguf(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return load(smollm2)


@pytest.fixture(scope="module")
def smol_json(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_data / "smollm_tokenizer")


@pytest.fixture(scope="module")
def spm(shared_data: Path) -> Tokenizer:
    return load(shared_data / "llamacpp_vocabs" / "ggml-vocab-llama-spm.gguf")


@pytest.mark.parametrize("name", ["deepseek-coder", "gpt-2", "llama-spm", "phi-3", "starcoder"])
def test_vectors_of_llama_cpp(shared_data: Path, name: str) -> None:
    path = shared_data / "llamacpp_vocabs" / f"ggml-vocab-{name}.gguf"
    tokenizer = load(path)
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == [int(i) for i in line.split()], text
        assert tokenizer.decode(ids) == text


def test_every_vocabulary_present_has_a_vector_test(shared_data: Path) -> None:
    present = {path.name for path in (shared_data / "llamacpp_vocabs").glob("*.gguf")}
    assert present == {f"ggml-vocab-{name}.gguf" for name in ("deepseek-coder", "gpt-2", "llama-spm", "phi-3", "starcoder")}


def real_lines(shared_data: Path) -> Iterator[str]:
    """10,000 lines: 2,500 each of chat intents, word problems, shell commands and encyclopedia."""
    intents = json.loads((shared_data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    yield from (text for text, _ in intents["train"][:2500])
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(1250)]
    yield from (row[field] for row in rows for field in ("question", "answer"))
    yield from (shared_data / "nl2bash" / "all.cm").read_text(encoding="utf-8").splitlines()[:2500]
    yield from (shared_data / "wikitext2" / "wiki.test.txt").read_text(encoding="utf-8").splitlines()[:2500]


def test_gguf_agrees_with_the_original_tokenizer_json(shared_data: Path, smol: Tokenizer, smol_json: Tokenizer) -> None:
    """The file is of a SmolLM-1 fine-tune with two tokens of its own at the end; the 49,152 before them are SmolLM2's."""
    assert smol.vocab_size == 49_152
    assert smol_json.vocab_size == 49_154
    for i in range(smol.vocab_size):
        assert (smol.token_text(i), smol.is_special(i)) == (smol_json.token_text(i), smol_json.is_special(i))
    lines = list(real_lines(shared_data))
    assert len(lines) == 10_000
    for number, line in enumerate(lines):
        ids = smol.encode(line)
        assert ids == smol_json.encode(line)
        if number % 10 == 0:
            assert smol.decode(ids) == line


def test_our_reading_of_tokenizer_json_is_that_of_the_library(shared_data: Path, smol_json: Tokenizer) -> None:
    """Control tokens in the text included: the library always parses them."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(shared_data / "smollm_tokenizer" / "tokenizer.json"))
    texts = ["a<|im_end|>b <|im_start|>user\n", "<|im_end|><|im_end|>", " [PAD] x[SEP]", "<file_sep><filename>", "plain  \n\n 12"]
    for text in texts:
        assert smol_json.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False).ids


def test_control_tokens_come_only_when_asked_for(smol: Tokenizer) -> None:
    text = "a<|im_end|>b"
    end = smol.control_id("<|im_end|>")
    assert end == 2
    assert end in smol.encode(text, parse_special=True)
    plain = smol.encode(text)
    assert not any(smol.is_special(i) for i in plain)
    assert smol.decode(plain) == text
    assert smol.decode(smol.encode(text, parse_special=True)) == "ab"
    assert smol.decode(smol.encode(text, parse_special=True), skip_special=False) == text


def test_names_of_the_model(smol: Tokenizer, spm: Tokenizer) -> None:
    assert (smol.bos_id, smol.eos_id, smol.eos_ids, smol.add_bos) == (1, 2, frozenset({0, 2}), False)
    assert (spm.bos_id, spm.eos_id, spm.eos_ids, spm.add_bos) == (1, 2, frozenset({2}), True)
    assert spm.encode("a")[0] == 1
    assert spm.encode("a", add_bos=False) == spm.encode("a")[1:]
    assert smol.token_bytes(2) == b""
    assert spm.token_bytes(spm.encode("\n", add_bos=False)[-1]) == b"\n"


def test_vocab_hash_tells_vocabularies_apart(smollm2: Path, smol: Tokenizer, smol_json: Tokenizer) -> None:
    assert smol.vocab_hash() == load(smollm2).vocab_hash()
    assert smol.vocab_hash() != smol_json.vocab_hash()


def sentencepiece_ids(tokenizer: Tokenizer, ids: dict[str, int], scores: list[float], text: str) -> list[int]:
    """SentencePiece's BPE as published: join the neighbours with the best score, leftmost first, until none can be joined."""
    symbols = list("▁" + text.replace(" ", "▁"))
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    heap: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and symbols[left] + symbols[right] in ids:
            union = symbols[left] + symbols[right]
            heapq.heappush(heap, (-scores[ids[union]], left, right, union))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while heap:
        _, left, right, union = heapq.heappop(heap)
        if not symbols[left] or not symbols[right] or after[left] != right or symbols[left] + symbols[right] != union:
            continue
        symbols[left], symbols[right] = union, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    out: list[int] = []
    for symbol in filter(None, symbols):
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


def test_sentencepiece_merges_are_exact(shared_data: Path, spm: Tokenizer) -> None:
    """Also where tokens overlap themselves (runs of one character), which merges ordered by score could get wrong."""
    with open_gguf(shared_data / "llamacpp_vocabs" / "ggml-vocab-llama-spm.gguf") as file:
        scores = file.get_array("tokenizer.ggml.scores").numbers().tolist()
    ids = {spm.token_text(i): i for i in range(spm.vocab_size) if not spm.is_special(i)}
    words = [text.replace("▁", " ") for text in list(ids)[256:]]
    rng = random.Random(0)
    for _ in range(150):
        texts = (
            "".join(rng.choices(words, k=6)),
            rng.choice("-=_*#./ \n0aA~") * rng.randint(1, 80),
            "".join(rng.choice("-= ") * rng.randint(1, 12) for _ in range(5)),
            "".join(rng.choices("aeinorst hl", k=40)),
            "".join(
                chr(rng.choice((rng.randint(32, 126), rng.randint(160, 1500), rng.randint(0x1F300, 0x1F6FF)))) for _ in range(20)
            ),
        )
        for text in texts:
            assert spm.encode(text, add_bos=False) == sentencepiece_ids(spm, ids, scores, text), text


def test_sentencepiece_text_continues_without_a_space(spm: Tokenizer) -> None:
    whole = spm.encode("Say: Hello", add_bos=False)
    assert spm.encode("Say:", add_bos=False) + spm.encode(" Hello", continues=True) == whole
    assert spm.encode("Hello", continues=True) != spm.encode("Hello", add_bos=False)


@pytest.mark.parametrize("vocabulary", ["smol", "spm"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=60))
def test_text_survives(vocabulary: str, text: str, request: pytest.FixtureRequest) -> None:
    """Except for bytes that SmolLM's vocabulary lacks: its training text had none of some control characters and planes."""
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    if vocabulary == "smol":
        known = b"".join(tokenizer.token_bytes(i) for i in range(17, 300))
        text = "".join(c for c in text if all(byte in known for byte in c.encode()))
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


LONG = {
    "word": "a",
    "spaces": " ",
    "newlines": "\n",
    "emoji": "🦙",
    "joined emoji": "👩\u200d",
    "NUL": "\0",
    "marks": "e\u0301",
    "digits": "7",
    "blanks then a letter": " \t",
}


@pytest.mark.parametrize("what", LONG)
@pytest.mark.parametrize("vocabulary", ["smol", "spm"])
def test_long_texts_take_linear_time(vocabulary: str, what: str, request: pytest.FixtureRequest) -> None:
    """Four times the text may take at most ten times as long (quadratic would be sixteen), on top of the clock's noise."""
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)

    def seconds(count: int) -> float:
        text = LONG[what] * count + "x"
        begin = time.process_time()
        ids = tokenizer.encode(text, add_bos=False)
        assert ids
        return time.process_time() - begin

    small = min(seconds(15_000) for _ in range(2))
    # what else runs here may slow one measurement; quadratic time would slow all
    assert any(seconds(60_000) < 10 * small + 0.05 for _ in range(3))


@pytest.mark.parametrize("name", pretokenizers.PRE_TOKENIZERS)
def test_pre_tokenizers_lose_nothing_and_are_linear(name: str) -> None:
    spec = pretokenizers.PRE_TOKENIZERS[name]
    cutter = pretokenizers.build(spec)
    text = "It's 12345 o'clock,\r\n\n  DON'T  wait… 中文한국 naïve_code(x);\t<b>  \n"
    for sample in (text, " " * 3_000 + "5x", "\n" * 3_000 + "é", "A" * 3_000, "!" * 3_000):
        pieces = [piece for piece, _ in cutter.pre_tokenize_str(sample)]
        assert bytes(tokenizer_byte(c) for piece in pieces for c in piece).decode() == sample
    begin = time.process_time()
    cutter.pre_tokenize_str(" " * 50_000 + "5x")
    assert time.process_time() - begin < 2


def tokenizer_byte(character: str) -> int:
    from nomoat.text.tokenizer import BYTE_OF

    return BYTE_OF[character]


def test_unknown_pre_tokenizer_is_named() -> None:
    with pytest.raises(ModelError, match=r"`\\x1bnew-one`.*tokenizer\.json") as caught:
        pretokenizers.pre_tokenizer_spec("\x1bnew-one")
    assert caught.value.code == "E_PRE"


def test_lone_surrogates_are_refused(smol: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (smol, spm):
        with pytest.raises(InputError, match=r"U\+D800") as caught:
            tokenizer.encode("a\ud800b")
        assert caught.value.code == "E_UTF8"


@pytest.mark.parametrize("token", [-1, 49_152, 2**40])
def test_ids_outside_the_vocabulary_are_refused(smol: Tokenizer, token: int) -> None:
    for use in (smol.token_bytes, smol.is_special, lambda i: smol.decode([i]), smol.token_text):
        with pytest.raises(InputError, match="expected 0 to 49151"):
            use(token)


def test_added_tokens_longest_first_and_flags() -> None:
    tokens = AddedTokens(
        [
            AddedToken(0, "<a>", control=True),
            AddedToken(1, "<a><b>", control=True),
            AddedToken(2, "##", control=False),
            AddedToken(3, "####", control=False),
            AddedToken(4, "<r>", control=True, rstrip=True),
            AddedToken(5, "<l>", control=True, lstrip=True),
            AddedToken(6, "word", control=False, single_word=True),
        ]
    )
    assert list(tokens.split("x<a><b>y", control=True)) == ["x", 1, "y"]
    assert list(tokens.split("<a><a>", control=True)) == [0, 0]
    assert list(tokens.split("<a>#####<a>", control=False)) == ["<a>", 3, "#<a>"]
    assert list(tokens.split("x <r>  y <l>z", control=True)) == ["x ", 4, "y", 5, "z"]
    assert list(tokens.split("sword word, words", control=True)) == ["sword ", 6, ", words"]
    assert list(tokens.split("", control=True)) == []


@settings(max_examples=80, deadline=None)
@given(
    contents=st.sets(st.text("<|ab>", min_size=1, max_size=5), min_size=1, max_size=12),
    text=st.text("<|abc>", max_size=40),
)
def test_added_tokens_match_a_plain_search(contents: set[str], text: str) -> None:
    ids = {content: i for i, content in enumerate(sorted(contents))}
    tokens = AddedTokens([AddedToken(i, content, control=True) for content, i in ids.items()])
    expected: list[str | int] = []
    at = 0
    while at < len(text):
        found = max((c for c in contents if text.startswith(c, at)), key=len, default="")
        if found:
            expected.append(ids[found])
        elif expected and isinstance(expected[-1], str):
            expected[-1] += text[at]
        else:
            expected.append(text[at])
        at += len(found) or 1
    assert list(tokens.split(text, control=True)) == expected


def test_many_added_tokens_do_not_slow_the_search() -> None:
    few = AddedTokens([AddedToken(0, "<x>", control=True)])
    many = AddedTokens([AddedToken(i, f"<tok{i}>", control=True) for i in range(20_000)])
    text = "<tok<tok1" * 5_000

    def seconds(tokens: AddedTokens) -> float:
        begin = time.process_time()
        list(tokens.split(text, control=True))
        return time.process_time() - begin

    assert seconds(many) < 20 * seconds(few) + 0.2
