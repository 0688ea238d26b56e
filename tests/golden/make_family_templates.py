"""Writes family_templates.json: what transformers' `apply_chat_template` gives for the families that nomoat runs.

    PYTHONPATH=src:tests .parity/bin/python -m golden.make_family_templates ../shared/data/chat_templates

Beyond make_chat_templates.py: the families' own begin and end tokens, tool calls with their results, answers that hold
reasoning, and the variables that templates read. For each template and case: the sha256 of the text, or "error: KIND".
`tests/parity` runs `make` again and compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golden.make_chat_templates import MESSAGES, TOOLS

FILE = Path(__file__).with_name("family_templates.json")

Json = dict[str, Any]
CALL: Json = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": 'a "b" <c>'}}}
TOOL_TALK: list[Json] = [
    {"role": "user", "content": "Use f."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"y": 1}', "name": "f", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "It is 1."},
    {"role": "user", "content": "Thanks"},
]
REASONED: list[Json] = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
    {"role": "user", "content": "And 2+2?"},
]


@dataclass(frozen=True)
class Case:
    """Arguments of one rendering."""

    messages: list[Json]
    tools: list[Json] | None = None
    prompt: bool = True
    variables: Json = field(default_factory=dict)


CASES: dict[str, Case] = {
    "prompt": Case(MESSAGES[1:]),
    "system": Case(MESSAGES),
    "no_prompt": Case(MESSAGES[1:3], prompt=False),
    "tools": Case(MESSAGES, TOOLS),
    "tool_talk": Case(TOOL_TALK, TOOLS),
    "reasoned": Case(REASONED),
    "thinking": Case(REASONED, variables={"enable_thinking": True}),
    "not_thinking": Case(REASONED, variables={"enable_thinking": False}),
    "date": Case(MESSAGES, variables={"date_string": "01 Jan 2025"}),
}

LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>")
QWEN = (None, "<|im_end|>")
MISTRAL = ("<s>", "</s>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
#: template -> the family's tokens that begin and end a text
FAMILIES: dict[str, tuple[str | None, str]] = {
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA3,
    "meta-llama-Llama-3.2-3B-Instruct": LLAMA3,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA3,
    "mistralai-Mistral-Nemo-Instruct-2407": MISTRAL,
    "Mistral-Small-3.2-24B-Instruct-2506": MISTRAL,
    "unsloth-mistral-Devstral-Small-2507": MISTRAL,
    "Qwen-Qwen2.5-7B-Instruct": QWEN,
    "Qwen-QwQ-32B": QWEN,
    "Qwen-Qwen3-0.6B": QWEN,
    "Qwen3-Coder": QWEN,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": DEEPSEEK,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": DEEPSEEK,
    "google-gemma-2-2b-it": ("<bos>", "<eos>"),
    "microsoft-Phi-3.5-mini-instruct": ("<s>", "<|endoftext|>"),
    "HuggingFaceTB-SmolLM3-3B": (None, "<|im_end|>"),
    "ibm-granite-granite-3.3-2B-Instruct": ("<|end_of_text|>", "<|end_of_text|>"),
}


def make(folder: Path) -> dict[str, dict[str, str]]:
    """template -> case -> sha256 of the text, or the kind of error."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    from golden.make_chat_templates import _Clock

    vars(chat_template_utils)["datetime"] = _Clock
    made: dict[str, dict[str, str]] = {}
    for name, (bos, eos) in FAMILIES.items():
        source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos, chat_template=source
        )
        made[name] = {}
        for title, case in CASES.items():
            try:
                text = tokenizer.apply_chat_template(
                    case.messages, tools=case.tools, add_generation_prompt=case.prompt, tokenize=False, **case.variables
                )
                made[name][title] = hashlib.sha256(text.encode()).hexdigest()
            except Exception as error:  # templates may raise anything
                made[name][title] = f"error: {type(error).__name__}"
    return made


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
