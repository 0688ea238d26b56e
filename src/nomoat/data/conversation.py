"""The messages of one row: OpenAI's and ShareGPT's forms, checked field by field, in the form chat templates take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomoat.data import strict_json
from nomoat.errors import DataError, printable

Message = dict[str, Any]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_MESSAGE_FIELDS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Place:
    """Where a row stands, for error messages: `element` counts from 0 where the file is one JSON array."""

    path: Path
    line: int
    element: int | None = None

    def name(self, field: str | None) -> str | None:
        """The path of a field from the top of the file: `messages[0].role`, in an array `[17].messages[0].role`."""
        if self.element is None:
            return field
        return f"[{self.element}]" if field is None else f"[{self.element}].{field}"

    def fault(self, message: str, *, field: str | None = None, code: str = "E_TYPE") -> DataError:
        return DataError(message, code=code, path=self.path, line=self.line, field=self.name(field))

    def parse(self, text: str, field: str | None = None) -> Any:
        """`strict_json.parse` of this row, or of the JSON text in one of its fields."""
        return strict_json.parse(text, path=self.path, line=self.line, field=self.name(field))


def text_of(value: Any, place: Place, field: str) -> str:
    """Text, or OpenAI's list of text parts joined. Raises DataError E_TYPE."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return "".join(_part(part, place, f"{field}[{at}]") for at, part in enumerate(value))
    raise place.fault(f"{_shown(value)}; expected text", field=field)


def _part(part: Any, place: Place, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind == "text" and isinstance(text, str):
        return text
    expected = '{"type": "text", "text": ...}, since only text is learned'
    raise place.fault(f"a part of type {_shown(kind)}; expected {expected}", field=field)


def openai_messages(value: Any, place: Place, ignored: Counter[str], field: str = "messages") -> list[Message]:
    """Raises DataError E_TYPE with the field, such as `messages[2].content`. Keys that mean nothing are counted."""
    made: list[Message] = []
    for at, item in enumerate(_turns(value, place, field)):
        where = f"{field}[{at}]"
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise place.fault(f"{_shown(role)}; expected one of {', '.join(_ROLES)}", field=f"{where}.role")
        message: Message = {"role": _ROLES[role]}
        calls = item.get("tool_calls")
        if calls is not None:
            if message["role"] != "assistant":
                raise place.fault("only an assistant message calls tools", field=f"{where}.tool_calls")
            message["tool_calls"] = tool_calls(calls, place, f"{where}.tool_calls")
        content = item.get("content")
        # OpenAI writes null beside tool calls; templates would print "None"
        message["content"] = "" if content is None and calls is not None else text_of(content, place, f"{where}.content")
        _copy_weight(item, message, place, where)
        for key in ("name", "tool_call_id", "reasoning_content"):
            if item.get(key) is not None:
                message[key] = text_of(item[key], place, f"{where}.{key}")
        ignored.update(f"{field}[].{key}" for key in item if key not in _MESSAGE_FIELDS)
        made.append(message)
    return made


def sharegpt_messages(value: Any, place: Place, ignored: Counter[str]) -> list[Message]:
    """`conversations` with from/value. A `function_call` is JSON text: one call, or a list of them."""
    made: list[Message] = []
    for at, item in enumerate(_turns(value, place, "conversations")):
        where = f"conversations[{at}]"
        speaker = item.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise place.fault(f"{_shown(speaker)}; expected one of {', '.join(_SHAREGPT_ROLES)}", field=f"{where}.from")
        text = text_of(item.get("value"), place, f"{where}.value")
        message: Message = {"role": _SHAREGPT_ROLES[speaker], "content": text}
        if speaker == "function_call":
            calls = place.parse(text, f"{where}.value")
            calls = calls if isinstance(calls, list) else [calls]
            message["content"] = ""
            message["tool_calls"] = tool_calls([{"function": call} for call in calls], place, f"{where}.value")
        _copy_weight(item, message, place, where)
        ignored.update(f"conversations[].{key}" for key in item if key not in ("from", "value", "weight"))
        made.append(message)
    return made


def tool_calls(value: Any, place: Place, field: str) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {"name", "arguments": object}, "id"?}]: OpenAI writes `arguments` as JSON
    text, templates want the object."""
    if not isinstance(value, list) or not value:
        raise place.fault(f"{_shown(value)}; expected a list of calls", field=field)
    made = []
    for at, call in enumerate(value):
        where = f"{field}[{at}]"
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise place.fault('expected {"function": {"name": ..., "arguments": ...}}', field=where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            where = f"{where}.function.arguments"
            arguments = place.parse(arguments, where)
        if not isinstance(arguments, dict):
            raise place.fault(f"{_shown(arguments)}; expected an object of arguments", field=where)
        made_call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            made_call["id"] = call["id"]
        made.append(made_call)
    return made


def tool_list(value: Any, place: Place) -> list[dict[str, Any]] | None:
    """`tools` as OpenAI has it: a list (or JSON text of one); a bare function description is wrapped."""
    if isinstance(value, str):
        value = place.parse(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise place.fault(f"{_shown(value)}; expected a list of tools", field="tools")
    made = []
    for at, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise place.fault('expected {"type": "function", "function": {"name": ..., "parameters": ...}}', field=f"tools[{at}]")
        made.append({"type": "function", "function": function})
    return made


def _turns(value: Any, place: Place, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise place.fault(f"{_shown(value)}; expected a list of messages", field=field)
    for at, item in enumerate(value):
        if not isinstance(item, dict):
            raise place.fault(f"{_shown(item)}; expected an object", field=f"{field}[{at}]")
    return value


def _copy_weight(item: dict[str, Any], message: Message, place: Place, where: str) -> None:
    weight = item.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise place.fault(f"{_shown(weight)}; expected 0 (do not learn this answer) or 1", field=f"{where}.weight")
    if message["role"] == "assistant":
        message["weight"] = int(weight)
    elif weight == 1:
        raise place.fault("only assistant messages are learned; expected 0 or no weight here", field=f"{where}.weight")


def _shown(value: Any) -> str:
    if value is None:
        return "it is missing or null"
    if isinstance(value, (list, dict)):
        return "an empty one" if not value else ("a list" if isinstance(value, list) else "an object")
    return repr(printable(str(value)[:40]))
