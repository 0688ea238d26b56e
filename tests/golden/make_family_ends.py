"""Writes family_ends.json: at which tokens llama.cpp ends an answer, for the special tokens of each family's GGUF files.

    PYTHONPATH=src:tests .venv/bin/python -m golden.make_family_ends LLAMACPP_PYTHON

LLAMACPP_PYTHON is a Python with llama-cpp-python 0.3.36. A vocabulary here is a few ordinary tokens and the family's special
ones, with the types that published files give them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from vocabularies import write_vocabulary

FILE = Path(__file__).with_name("family_ends.json")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPM_START = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]


def control(*texts: str) -> list[tuple[str, int]]:
    return [(text, CONTROL) for text in texts]


@dataclass(frozen=True)
class Family:
    """`tokens`: special ones, with types; `ids`: keys of tokenizer.ggml that name one of them by its text."""

    model: str
    tokens: list[tuple[str, int]]
    ids: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """A GGUF with this vocabulary."""
        texts = [text for text, _ in self.tokens]
        types = [kind for _, kind in self.tokens]
        byte_level = self.model == "gpt2"
        plain = ["a", "b", "ab", "Ċ", "Ġ"] if byte_level else ["▁", "a", "b", *(f"<0x{value:02X}>" for value in range(256))]
        return write_vocabulary(
            path,
            self.model,
            [*texts, *plain],
            types=[*types, *(6 if text.startswith("<0x") else NORMAL for text in plain)],
            scores=None if byte_level else [-float(i) for i in range(len(texts) + len(plain))],
            merges=["a b"] if byte_level else None,
            **({"pre": "gpt-2"} if byte_level else {}),
            **{f"{key}_token_id": texts.index(text) for key, text in self.ids.items()},
        )


LLAMA3 = control("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                 "<|python_tag|>")  # fmt: skip
QWEN_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
QWEN = [*control("<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_FIM), ("<tool_call>", USER_DEFINED)]
STARCODER = control("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>")
DEEPSEEK = control("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

FAMILIES: dict[str, Family] = {
    "llama-2, mistral, mixtral, tinyllama": Family("llama", SPM_START, {"bos": "<s>", "eos": "</s>"}),
    "llama-3": Family("gpt2", LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}),
    "llama-3 base": Family("gpt2", LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}),
    "mistral tekken": Family("gpt2", control("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), {"bos": "<s>", "eos": "</s>"}),
    "qwen2, qwen3": Family("gpt2", [*QWEN, ("</s>", NORMAL)], {"bos": "<|endoftext|>", "eos": "<|im_end|>"}),
    "qwen2.5-coder base": Family("gpt2", QWEN, {"eos": "<|endoftext|>"}),
    "deepseek-r1-distill-qwen": Family(
        "gpt2", [*DEEPSEEK, *control("<|EOT|>", *QWEN_FIM)], {"bos": DEEPSEEK[0][0], "eos": DEEPSEEK[1][0]}
    ),
    "deepseek-r1-distill-llama": Family("gpt2", [*DEEPSEEK, *LLAMA3], {"bos": DEEPSEEK[0][0], "eos": DEEPSEEK[1][0]}),
    "gemma": Family(
        "llama",
        [*control("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("<unk>", UNKNOWN), ("</s>", USER_DEFINED)],
        {"bos": "<bos>", "eos": "<eos>"},
    ),
    "phi3": Family(
        "llama",
        [*SPM_START, *control("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")],
        {"bos": "<s>", "eos": "<|endoftext|>"},
    ),
    "phi4-mini": Family(
        "gpt2", control("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"), {"eos": "<|endoftext|>"}
    ),
    "smollm2": Family(
        "gpt2",
        control("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
        {"bos": "<|im_start|>", "eos": "<|im_end|>"},
    ),
    "smollm3": Family(
        "gpt2", [*LLAMA3, *control("<|im_start|>", "<|im_end|>")], {"bos": "<|begin_of_text|>", "eos": "<|im_end|>"}
    ),
    "olmo2": Family("gpt2", control("<|endoftext|>", "<|endofprompt|>", "<|pad|>"), {"eos": "<|endoftext|>"}),
    "granite": Family(
        "gpt2",
        control("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>"),
        {"bos": "<|end_of_text|>", "eos": "<|end_of_text|>"},
    ),
    "granite code, starcoder2": Family("gpt2", STARCODER, {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    "deepseek-coder": Family(
        "gpt2",
        [*DEEPSEEK[:2], *control("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|EOT|>")],
        {"bos": DEEPSEEK[0][0], "eos": DEEPSEEK[1][0]},
    ),
    "yi chat": Family(
        "llama",
        [("<unk>", UNKNOWN), *control("<|startoftext|>", "<|endoftext|>"), ("<|im_start|>", NORMAL), ("<|im_end|>", NORMAL)],
        {"bos": "<|startoftext|>", "eos": "<|endoftext|>"},
    ),
    "codellama": Family(
        "llama",
        [*SPM_START, *((text, NORMAL) for text in ("▁<SUF>", "▁<PRE>", "▁<MID>", "▁<EOT>"))],
        {"bos": "<s>", "eos": "</s>", "prefix": "▁<PRE>", "suffix": "▁<SUF>", "middle": "▁<MID>", "eot": "▁<EOT>"},
    ),
}  # fmt: skip


def make(python: str) -> dict[str, list[str]]:
    """family -> texts of the tokens at which llama.cpp ends an answer."""
    from golden.llamacpp_side import ask

    with tempfile.TemporaryDirectory() as folder:
        files = [family.write(Path(folder) / f"{n}.gguf") for n, family in enumerate(FAMILIES.values())]
        answers = ask(python, [{"file": str(file), "texts": []} for file in files])
    return {
        name: [family.tokens[i][0] for i in answer["ends"]]
        for (name, family), answer in zip(FAMILIES.items(), answers, strict=True)
    }


if __name__ == "__main__":
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(ends, ensure_ascii=False)}" for name, ends in make(sys.argv[1]).items())
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
