"""Writes chat_templates.json: what transformers renders for every template of ../shared/data/chat_templates.

    PYTHONPATH=src:tests .parity/bin/python -m golden.make_chat_templates ../shared/data/chat_templates

For each template and conversation: the sha256 of the text, or "error: KIND" where transformers fails too.
`tests/parity` runs `make` again and compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("chat_templates.json")

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "does f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "an <x>"}},
                "required": ["x"],
            },
        },
    }
]
#: name -> (messages, tools)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": (MESSAGES, None),
    "no_system": (MESSAGES[1:], None),
    "tools": (MESSAGES, TOOLS),
}
DATE = (2024, 7, 26)


class _Clock(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Clock:
        return cls(*DATE)


def make(folder: Path) -> dict[str, dict[str, str]]:
    """template file -> conversation -> sha256 of the text, or the kind of error."""
    from transformers.utils import chat_template_utils

    vars(chat_template_utils)["datetime"] = _Clock
    compile_template = chat_template_utils._compile_jinja_template
    made: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jinja")):
        made[path.name] = {}
        for name, (messages, tools) in CONVERSATIONS.items():
            try:
                text = compile_template(path.read_text(encoding="utf-8")).render(
                    messages=messages, tools=tools, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
                )
                made[path.name][name] = hashlib.sha256(text.encode()).hexdigest()
            except Exception as error:  # templates may raise anything
                made[path.name][name] = f"error: {type(error).__name__}"
    return made


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
