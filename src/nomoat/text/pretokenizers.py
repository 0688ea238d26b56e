"""`tokenizer.ggml.pre` -> how text is cut into pieces before byte-pair merges.

A GGUF file names its pre-tokenizer but does not hold it. Each row gives the steps of the original tokenizer.json of that
model family, in order; what one step leaves is cut by the next. Regular expressions run on Onigmo (inside `tokenizers`) and
come only from this table, never from a file. Only families whose published tokenizer.json was seen are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomoat.errors import ModelError, printable

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

DIGITS = "digits"  # every digit alone
NUMBERS = "numbers"  # runs of digits
PUNCTUATION = "punctuation"  # runs of punctuation
GPT2 = "gpt2"  # GPT-2's own expression, then bytes -> printable characters


@dataclass(frozen=True)
class PreTokenizerSpec:
    """`steps`: the names above, or a regular expression whose every match becomes a piece, and so does the text between.

    `whole_tokens`: a piece that is itself in the vocabulary is taken as it is, without merging (`ignore_merges`).
    `nfc`: text is normalized to Unicode NFC first. `add_bos`: the family starts a text with BOS unless the file says otherwise.
    """

    steps: tuple[str, ...]
    whole_tokens: bool = False
    nfc: bool = False
    add_bos: bool = False


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SYMBOLS, _SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SYMBOLS_MARKS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_GPT2_ROW = PreTokenizerSpec((GPT2,))
_CL100K = "|".join((_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _REST))
_STARCODER_ROW = PreTokenizerSpec((DIGITS, GPT2))
_LLAMA3_ROW = PreTokenizerSpec((_CL100K,), whole_tokens=True, add_bos=True)
_QWEN2_ROW = PreTokenizerSpec(("|".join((_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _REST)),), nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "gpt-2": _GPT2_ROW,
    "phi-2": _GPT2_ROW,
    "smollm": _STARCODER_ROW,
    "starcoder": _STARCODER_ROW,
    "refact": _STARCODER_ROW,
    "llama-bpe": _LLAMA3_ROW,
    "llama-v3": _LLAMA3_ROW,
    "llama3": _LLAMA3_ROW,
    "smaug-bpe": PreTokenizerSpec((_CL100K,), whole_tokens=True),  # Llama 3's, of models that drop BOS, such as SmolLM3
    "dbrx": PreTokenizerSpec((_CL100K,)),  # also OLMo 2, Granite 4, Phi-4
    "qwen2": _QWEN2_ROW,
    "deepseek-r1-qwen": _QWEN2_ROW,
    "qwen35": PreTokenizerSpec(
        ("|".join((_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", _SYMBOLS_MARKS, _REST)),), nfc=True
    ),
    "tekken": PreTokenizerSpec(("|".join((*_CASED, r"\p{N}", _SYMBOLS_SLASH, _REST)),), whole_tokens=True, add_bos=True),
    "gpt-4o": PreTokenizerSpec(
        ("|".join((*(cased + _CONTRACTION + "?" for cased in _CASED), r"\p{N}{1,3}", _SYMBOLS_SLASH, _REST)),)
    ),
    "deepseek-coder": PreTokenizerSpec((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGITS)),
    "falcon": PreTokenizerSpec((PUNCTUATION, GPT2, NUMBERS, "[0-9][0-9][0-9]")),
}


def pre_tokenizer_spec(name: str) -> PreTokenizerSpec:
    """The row called `name`. Raises ModelError E_PRE for any other name: a guess would cost quality and nobody would notice."""
    spec = PRE_TOKENIZERS.get(name)
    if spec is None:
        raise ModelError(
            f"the tokenizer uses the pre-tokenizer `{printable(name[:80])}` (tokenizer.ggml.pre), which nomoat does not know"
            f" (known: {', '.join(sorted(PRE_TOKENIZERS))}); give the folder that holds the model's tokenizer.json instead",
            code="E_PRE",
        )
    return spec


def build(spec: PreTokenizerSpec) -> PreTokenizer:
    """The row as a `tokenizers` object. Bytes are mapped to printable characters by GPT2, else in a last step."""
    from tokenizers import pre_tokenizers as pre

    steps = [_step(step) for step in spec.steps]
    if GPT2 not in spec.steps:
        steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre.Sequence(steps)


def _step(step: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    match step:
        case "digits" | "numbers":
            return pre.Digits(individual_digits=step == DIGITS)
        case "punctuation":
            return pre.Punctuation(behavior="contiguous")
        case "gpt2":
            return pre.ByteLevel(add_prefix_space=False, use_regex=True)
        case _:
            return pre.Split(Regex(step), "isolated")
