"""The tokenizer of a Hugging Face folder as the keys of a GGUF.

A GGUF names its pre-tokenizer but does not hold it, so the folder's is recognized: the row of `text/pretokenizers.py` that cuts
PROBE as it does. A SentencePiece vocabulary gets its scores from the order of the merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nomoat.errors import ModelError, printable
from nomoat.text import pretokenizers
from nomoat.text.tokenizer import Tokenizer, TokenType
from nomoat.text.tokenizer_json import template_source

#: Words, contractions of both cases, digits, punctuation, scripts, line breaks, spaces: whatever the rows treat differently.
PROBE = (
    "Hello World's HELLO'S we'Ll CamelCaseABC x1234567 12 3.14,15 a  b   c\n\n\nd \r\n e\t\tf !!?? ...// (\u00bfqu\u00e9?) "
    "na\u00efve e\u0301te\u0301 \u4e2d\u6587\u5b57 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0627\u0644\u0639 "
    "\U0001f600\U0001f680 _snake_case \u0664\u0665\u0666 \u2160\u2161 \u0928\u092e\u0938\u094d\u0924\u0947 end/\n  "
)


def tokenizer_keys(folder: Path, size: int) -> dict[str, Any]:
    """`tokenizer.*` for a vocabulary of `size` rows. Raises ModelError E_TOKENIZER or E_PRE where GGUF cannot say it."""
    tokenizer = Tokenizer.from_folder(folder)
    root = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))
    where = printable(str(folder / "tokenizer.json"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in root["model"].get("merges", [])]
    words = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
    if len(words) > size:
        raise ModelError(f"{where}: {len(words):,} tokens, but the model has an embedding for {size:,}", code="E_TOKENIZER")
    kinds = [int(kind) for kind in tokenizer.token_types]
    words = [word or f"[PAD{i}]" for i, word in enumerate(words)] + [f"[PAD{i}]" for i in range(len(words), size)]
    kinds += [int(TokenType.UNUSED)] * (size - len(kinds))
    keys: dict[str, Any] = {"tokens": words, "token_type": kinds, "add_bos_token": tokenizer.add_bos}
    if tokenizer.byte_level:
        if tokenizer.drops_first_space:
            raise ModelError(f"{where}: bytes with a space put before the text, which no GGUF can say", code="E_TOKENIZER")
        keys |= {"model": "gpt2", "pre": _pre_tokenizer(where, root), "merges": merges}
    else:
        keys |= {"model": "llama", "pre": "default", "scores": _scores(words, merges)}
        keys["add_space_prefix"] = tokenizer.drops_first_space
    if TokenType.UNKNOWN in kinds:
        keys["unknown_token_id"] = kinds.index(TokenType.UNKNOWN)
    other_ends = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": other_ends[0] if other_ends else None}
    keys |= {f"{name}_token_id": i for name, i in named.items() if i is not None}
    template = template_source(folder)
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return found | ({"tokenizer.chat_template": template} if template else {})


def _scores(words: list[str], merges: list[str]) -> list[float]:
    """Of two pairs that could be joined, SentencePiece joins the one whose result scores higher: here, the earlier merge."""
    made: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), -1.0 - rank)
    return [made.get(word, 0.0) for word in words]


def _pre_tokenizer(where: str, root: dict[str, Any]) -> str:
    """The name of the row that cuts as the folder does, takes whole tokens as it does, and normalizes as it does."""
    import tokenizers

    model = root["model"]
    bare = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": root.get("pre_tokenizer")}
    found = tokenizers.Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
    pieces = [piece for piece, _ in found.pre_tokenize_str(PROBE)] if found is not None else [PROBE]
    whole, nfc = bool(model.get("ignore_merges")), "NFC" in json.dumps(root.get("normalizer"))
    for name, row in pretokenizers.PRE_TOKENIZERS.items():
        same = row.nfc == nfc and row.whole_tokens == whole
        if same and [piece for piece, _ in pretokenizers.build(row).pre_tokenize_str(PROBE)] == pieces:
            return name
    raise ModelError(
        f"{where}: text is cut in a way that GGUF has no name for here; a GGUF of this model that somebody else made can be "
        "given instead of the folder",
        code="E_PRE",
    )
