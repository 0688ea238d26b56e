"""Fill in the middle: the prompt that makes a code model write what belongs between two texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nomoat.errors import ModelError
from nomoat.text.special import FIM_END_TEXTS, FIM_TEXTS

if TYPE_CHECKING:
    from nomoat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fim:
    """Tokens that stand before the text before the gap, before the text after it, and before what fills it. `ends`: what ends
    that, besides `Tokenizer.eos_ids`: padding, the next file, another gap."""

    prefix: int
    suffix: int
    middle: int
    ends: frozenset[int]


def find_fim(
    added: Mapping[str, int], *, named: tuple[int | None, int | None, int | None] = (None, None, None), ends: Iterable[int] = ()
) -> Fim | None:
    """The tokens that a file names (prefix, suffix, middle), and those it does not name by their text in `added` (text -> id).
    None if one of the three is missing."""
    texts = next((texts for texts in FIM_TEXTS if all(text in added for text in texts)), None)
    known = (None, None, None) if texts is None else tuple(added[text] for text in texts)
    prefix, suffix, middle = (by_text if given is None else given for given, by_text in zip(named, known, strict=True))
    if prefix is None or suffix is None or middle is None:
        return None
    after = (i for text, i in added.items() if text in FIM_END_TEXTS)
    return Fim(prefix, suffix, middle, frozenset((prefix, suffix, middle, *ends, *after)))


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Token ids of: the text before the gap, the text after it, "now the middle". Control strings in both stay plain text.

    Where the vocabulary writes a space before a text (SentencePiece), the prefix gets one and the suffix does not, as Code Llama
    was taught; what the model answers continues the prefix (`Sampling.continues`). Raises ModelError E_FIM.
    """
    fim = tokenizer.fim
    if fim is None:
        raise ModelError(
            "this model was not taught to fill a gap: its vocabulary has no tokens for prefix, suffix and middle (such as"
            " <|fim_prefix|>); use a code model that has them, for example Qwen2.5-Coder, StarCoder2 or Granite Code",
            code="E_FIM",
        )
    return [
        *tokenizer.encode(""),  # BOS, where the model wants it
        fim.prefix,
        *tokenizer.encode(prefix, add_bos=False),
        fim.suffix,
        *tokenizer.encode(suffix, continues=True),
        fim.middle,
    ]
