"""Writes pretokenizers.json: where hard texts are cut, by the published expressions and by llama.cpp.

    PYTHONPATH=src:tests .parity/bin/python -m golden.make_pretokenizers LLAMACPP_PYTHON

LLAMACPP_PYTHON is a Python with llama-cpp-python 0.3.36. The published expressions run on the `regex` package; nomoat runs its
table on Onigmo. llama.cpp has hand-written cutters and rewritten expressions. It shows its cuts through a vocabulary in which
any two neighbours within a piece can be joined, so that every piece becomes one token. Where it cuts differently from the
expression that the model's publisher gives, the publisher is right, and the place is kept in `llama_cpp_differs`.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("pretokenizers.json")

TEXTS = [
    "I'll we've IT'S don'T 'Re x'D o'clock 'tis",
    "Straſ'ſ and 'ſ, ’ll curly’s",
    "  two,   three    four spaces",
    "tab\tx\t\ty \t z\u00a0nbsp\u3000wide\u2003em",
    "line\nline\r\nline\n\n\nend\r",
    "trailing   ",
    "\n \n  \n\t\n x",
    "1 12 123 1234 12345 v1.23 x9y 3.14e-10",
    "١٢٣٤ ½² ⅣⅤ 千9 ๑๒๓",
    "!!! ... ?!;: (a[b]{c}) <d>/e/\n//f\n",
    "a_b __init__ -->== $5 +1 ~x ^y `z` |w|",
    "camelCaseHTTPServerError iPhone's McDonald",
    "ǅungla ǆ ªº ʰx ΑΒΓ абВ",
    "e\u0301te\u0301 n\u0303o A\u030angstro\u0308m",
    "हिन्दी में ไทย កាន់តែ বাংলা",
    "中文字符。我想在apple工作！日本語テスト ﾊﾝ",
    "한국어 텍스트 です",
    "👩\u200d💻🏽 🇩🇪 ✅️ 🦙🦙x",
    "€100 £5 ¥7 a©b ™ ∑x=∞",
    "def f(x):\n    return x**2  # ok\n",
    "https://a.b/c?d=e&f=1#g",
    "x\u200by\ufeffz \u00ad",
    "'''doc''' \"q\" «quote» „x“ —dash–",
    "A  \n\n  B \r\n\r\n C",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: row -> its steps as published: openai/gpt-2 encoder.py; tiktoken openai_public.py (cl100k_base, o200k_base), whose first is
#: also in the tokenizer of Llama 3, of OLMo 2 and of SmolLM3; the digits step before GPT-2's is tokenizers' `Digits`; Qwen from
#: transformers; tekken from config.pattern in mistral-common's tekken_240718.json; DeepSeek Coder from its tokenizer.json.
PUBLISHED: dict[str, list[str]] = {
    "gpt-2": [GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "smollm": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "llama-bpe": [CL100K],
    "smaug-bpe": [CL100K],
    "dbrx": [CL100K],
    "qwen2": ["transformers.models.qwen2.tokenization_qwen2"],
    "deepseek-r1-qwen": ["transformers.models.qwen2.tokenization_qwen2"],
    "qwen35": ["transformers.models.qwen3_5.tokenization_qwen3_5"],
    "tekken": [TEKKEN],
    "gpt-4o": [O200K],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
}


def cut(text: str, steps: list[str]) -> list[str]:
    """Every match is a piece, and so is the text between two; what a step leaves is cut by the next."""
    import regex

    pieces = [text]
    for step in steps:
        finer = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(step, piece):
                finer += [piece[at : match.start()], match.group()]
                at = match.end()
            finer.append(piece[at:])
        pieces = [piece for piece in finer if piece]
    return pieces


def published(row: str) -> list[str]:
    from importlib import import_module

    return [import_module(step).PRETOKENIZE_REGEX if step.startswith("transformers.") else step for step in PUBLISHED[row]]


def joining_vocabulary(path: Path, row: str, text: str) -> list[str]:
    """Writes a GGUF in which every substring of `text` is a token, made in every way. Returns the tokens."""
    from golden.make_tokenizers import BYTE_TEXT, written
    from vocabularies import write_vocabulary

    tokens = dict.fromkeys(BYTE_TEXT.values())
    merges: dict[str, None] = {}
    whole = written(text)
    for size in range(2, len(whole) + 1):
        for at in range(len(whole) - size + 1):
            union = whole[at : at + size]
            if union not in tokens:
                tokens[union] = None
                merges.update(dict.fromkeys(f"{union[:n]} {union[n:]}" for n in range(1, size)))
    write_vocabulary(path, "gpt2", list(tokens), merges=list(merges), pre=row, eos_token_id=0, bos_token_id=0)
    return list(tokens)


def llama_cpp_cuts(python: str, row: str, texts: list[str]) -> list[list[int]]:
    """Lengths in characters of the pieces of each text. One vocabulary a text: their number of merges grows with the third power
    of its length."""
    from golden.llamacpp_side import ask

    lengths = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.gguf" for n in range(len(texts))]
        tokens = [joining_vocabulary(file, row, text) for file, text in zip(files, texts, strict=True)]
        answers = ask(python, [{"file": str(file), "texts": [text]} for file, text in zip(files, texts, strict=True)])
        for text, names, answer in zip(texts, tokens, answers, strict=True):
            ends = set(itertools.accumulate(len(names[i]) for i in answer["ids"][0]))
            assert max(ends) == len(text.encode())
            cuts = [n for n in range(1, len(text) + 1) if len(text[:n].encode()) in ends]
            lengths.append([end - begin for begin, end in zip([0, *cuts], cuts, strict=False)])
    return lengths


def make(python: str | None) -> dict[str, Any]:
    """{"pieces": row -> lengths in characters of the pieces of each text, "llama_cpp_differs": row -> numbers of texts}.
    Without `python` llama.cpp is not asked."""
    pieces = {row: [list(map(len, cut(text, published(row)))) for text in TEXTS] for row in PUBLISHED}
    differs = {}
    for row in PUBLISHED if python else ():
        found = llama_cpp_cuts(python or "", row, TEXTS)
        differs[row] = [n for n, (ours, theirs) in enumerate(zip(pieces[row], found, strict=True)) if ours != theirs]
    return {"pieces": pieces, "llama_cpp_differs": {row: numbers for row, numbers in differs.items() if numbers}}


if __name__ == "__main__":
    made = make(sys.argv[1])
    lines = ",\n".join(
        f"  {json.dumps(row)}: {json.dumps(lengths, separators=(',', ':'))}" for row, lengths in made["pieces"].items()
    )
    differs = json.dumps(made["llama_cpp_differs"])
    FILE.write_text(f'{{\n"pieces": {{\n{lines}\n}},\n"llama_cpp_differs": {differs}\n}}\n', encoding="utf-8")
