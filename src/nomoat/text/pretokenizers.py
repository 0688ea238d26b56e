"""`tokenizer.ggml.pre` -> how text is cut into pieces before byte-pair merges.

A GGUF file names its pre-tokenizer but does not hold it. Each row gives the regular expressions of the original
tokenizer.json of that model family, in the order in which they cut; what one leaves is cut by the next. They run on Onigmo
(inside `tokenizers`) and come only from this table, never from a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomoat.errors import ModelError, printable

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class PreTokenizerSpec:
    """`patterns`: every match becomes a piece of its own, and so does the text between matches.

    `whole_tokens`: a piece that is itself in the vocabulary is taken as it is, without merging (`ignore_merges`).
    `nfc`: text is normalized to Unicode NFC first. `add_bos`: the family starts a text with BOS unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_tokens: bool = False
    nfc: bool = False
    add_bos: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_THEN_GPT2 = (r"\p{N}", _GPT2)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "gpt-2": PreTokenizerSpec((_GPT2,)),
    "smollm": PreTokenizerSpec(_DIGITS_THEN_GPT2),
    "starcoder": PreTokenizerSpec(_DIGITS_THEN_GPT2),
    "refact": PreTokenizerSpec(_DIGITS_THEN_GPT2),
    "llama-bpe": PreTokenizerSpec(
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL,), whole_tokens=True, add_bos=True
    ),
    "qwen2": PreTokenizerSpec((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL,), nfc=True),
    "deepseek-coder": PreTokenizerSpec(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
}


def pre_tokenizer_spec(name: str) -> PreTokenizerSpec:
    """The row called `name`. Raises ModelError E_PRE for a name that is not in the table: guessing would cost quality silently."""
    spec = PRE_TOKENIZERS.get(name)
    if spec is None:
        raise ModelError(
            f"the tokenizer uses the pre-tokenizer `{printable(name[:80])}`, which nomoat does not know"
            f" (known: {', '.join(sorted(PRE_TOKENIZERS))}); pass the model's original tokenizer.json instead",
            code="E_PRE",
        )
    return spec


def build(spec: PreTokenizerSpec) -> PreTokenizer:
    """The row as a `tokenizers` object; its last step maps bytes to printable characters."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    cuts: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in spec.patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
