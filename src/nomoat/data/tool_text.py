"""Tools for chat templates that know none: the tools in the system message, calls and results as tagged JSON.

The tags are those that the Hermes and Qwen model families were taught, so a model may know them already.
"""

from __future__ import annotations

import json
from typing import Any

from nomoat.data.conversation import Message

_HOW = 'To call a tool, answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The same conversation of system, user and assistant messages only; `weight` is kept, message by message."""
    made: list[Message] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if message["role"] == "tool":
            plain |= {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
        calls = [f"<tool_call>{_json(call['function'])}</tool_call>" for call in message.get("tool_calls", [])]
        if calls:
            plain["content"] = "\n".join([message["content"], *calls] if message["content"] else calls)
        made.append(plain)
    if tools:
        listing = "\n".join(["Tools:", *(_json(tool["function"]) for tool in tools), _HOW])
        if made and made[0]["role"] == "system":
            made[0]["content"] = f"{made[0]['content']}\n\n{listing}"
        else:
            made.insert(0, {"role": "system", "content": listing})
    return made


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
