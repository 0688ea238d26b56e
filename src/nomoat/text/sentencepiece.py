"""SentencePiece BPE vocabularies (Llama 2, Mistral): scores instead of merges."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tokenizers

SPACE = "\u2581"


def build(ids: dict[str, int], scores: npt.NDArray[np.generic]) -> tokenizers.Tokenizer:
    """Encoder that starts from characters and always joins the neighbours whose union has the best score.

    Characters outside the vocabulary become their UTF-8 bytes (`<0xE2>`...).
    """
    import tokenizers
    from tokenizers import normalizers

    merges = merges_from_scores(ids, scores)
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges, byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", SPACE)
    return built


def merges_from_scores(ids: dict[str, int], scores: npt.NDArray[np.generic]) -> list[tuple[str, str]]:
    """Every way to make a token out of two others, best score of the union first."""
    order = sorted(((-float(scores[i]), i, text) for text, i in ids.items() if len(text) > 1))
    return [
        (text[:cut], text[cut:]) for _, _, text in order for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids
    ]
