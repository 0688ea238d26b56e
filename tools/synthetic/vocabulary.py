"""Tokenizers of made models: some real tokens, the rest unused, so that text goes in and out of a vocabulary of any size.

Two kinds: `bytes` is byte-level BPE (tokenizer.ggml.model `gpt2`), `pieces` SentencePiece with bytes to fall back to (`llama`).
In both, id 1 begins a text and id 2 ends one; `<|im_end|>` ends an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Pairs that become one token, the first first; `Ġ` is a space.
MERGES = ("t h", "Ġ t", "Ġt h", "Ġth e", "i n", "e r", "Ġ a", "o n", "r e", "e n", "a t", "in g")
MIN_VOCAB = len(CONTROL) + 256 + len(MERGES)

PIECES_CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPACE = "\u2581"
PIECES_MERGES = tuple(merge.replace("Ġ", SPACE) for merge in MERGES)
PIECES = (*(merge.replace(" ", "") for merge in PIECES_MERGES), *sorted(set("".join(PIECES_MERGES)) - {" "}))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROLS, UNUSED, BYTE = 1, 2, 3, 5, 6  # tokenizer.ggml.token_type


def vocabulary(size: int, kind: str = "bytes") -> tuple[list[str], list[int]]:
    """Token texts as GGUF holds them, and their GGUF types, filled up with unused ones. Raises ValueError if they do not fit."""
    if kind == "bytes":
        tokens = [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
        types = [CONTROLS] * len(CONTROL) + [NORMAL] * (256 + len(MERGES))
    else:
        tokens = [*PIECES_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        types = [UNKNOWN] + [CONTROLS] * (len(PIECES_CONTROL) - 1) + [BYTE] * 256 + [NORMAL] * len(PIECES)
    if size < len(tokens):
        raise ValueError(f"a vocabulary of {size} does not hold {len(tokens)} tokens")
    unused = size - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(unused)], types + [UNUSED] * unused


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE, by byte value."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def gguf_tokenizer(size: int, kind: str = "bytes") -> dict[str, Any]:
    """Metadata of a GGUF."""
    tokens, types = vocabulary(size, kind)
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if kind == "bytes":
        own = {"model": "gpt2", "pre": "gpt-2", "merges": list(MERGES), "add_space_prefix": False}
    else:
        own = {"model": "llama", "pre": "default", "scores": _scores(tokens), "unknown_token_id": 0, "eot_token_id": 4}
        own["add_space_prefix"] = True
    return keys | {f"tokenizer.ggml.{key}": value for key, value in own.items()}


def _scores(tokens: list[str]) -> list[float]:
    """Of two tokens that could be made, SentencePiece makes the one of higher score."""
    made = {merge.replace(" ", ""): -1.0 - i for i, merge in enumerate(PIECES_MERGES)}
    return [made.get(token, 0.0) for token in tokens]


def write_hf_tokenizer(folder: Path, size: int, kind: str = "bytes") -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokens, _ = vocabulary(size, kind)
    control = CONTROL if kind == "bytes" else PIECES_CONTROL
    tokenizer = _byte_level(tokens) if kind == "bytes" else _pieces(tokens)
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": control[1], "eos_token": control[2], "unk_token": control[0], "pad_token": control[2]}
    names = {"chat_template": CHAT_TEMPLATE, "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | names))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))


def _byte_level(tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_ids(tokens), merges=_pairs(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [(piece[:i], piece[i:]) for piece in PIECES for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= set(PIECES)]
    model = models.BPE(vocab=_ids(tokens), merges=merges, unk_token=PIECES_CONTROL[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _pairs(merges: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in (merge.split(" ") for merge in merges)]
