"""A programming problem, the two ways to ask it, and how an answer becomes a program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nomoat.data import source, strict_json
from nomoat.errors import DataError

Style = Literal["chat", "complete"]


@dataclass(frozen=True)
class Problem:
    """One row of a benchmark. `line` is where it starts in its file.

    `question` is what a chat model is asked; `beginning` what a base model continues. A program is `helpers` and an answer
    that defines `entry`, or `opening` and an answer that goes on after it. `tests` is what `sandbox.judge` takes.
    """

    id: str
    line: int
    question: str
    beginning: str
    helpers: str
    opening: str
    entry: str
    reference: str
    tests: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A benchmark. `files` are the names under which it is looked for; `origin` says where its users get it.

    `stop` ends what a base model writes. `read` gives the problems of a file, or raises DataError.
    """

    name: str
    files: tuple[str, ...]
    origin: str
    read: Callable[[Path], list[Problem]]
    stop: tuple[str, ...]
    max_tokens: int = 512


def program(problem: Problem, answer: str, style: Style) -> str:
    """The Python program that an answer stands for."""
    if style == "complete":
        return problem.opening + answer
    code = extract(answer, problem.entry)
    return (problem.helpers if _defines(code, problem.entry) else problem.opening) + code


# A fence may be indented, name any language, and be left open by an answer that was cut.
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def extract(answer: str, entry: str) -> str:
    """The code of a chat answer: its first fenced block that defines `entry`, else its first block, else all of it."""
    blocks: list[str] = _BLOCK.findall(answer)
    defining = [block for block in blocks if _defines(block, entry)]
    return (defining or blocks or [answer])[0]


def _defines(code: str, entry: str) -> bool:
    return (
        re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*=", code, re.MULTILINE) is not None
    )


def rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of each row of a file: JSON lines, or one JSON array. Raises DataError."""
    from hashlib import sha256

    with source.open_data(path) as file:
        pieces = source.array_elements if source.starts_array(file) else source.lines
        found = []
        for line, text in pieces(file, path, sha256()):
            if not text.strip():
                continue
            row = strict_json.parse(text, path=path, line=line)
            if not isinstance(row, dict):
                raise DataError("expected a JSON object", code="E_TYPE", path=path, line=line)
            found.append((line, row))
    if not found:
        raise DataError("the file has no rows", code="E_EMPTY", path=path)
    return found


def text_of(row: dict[str, Any], field: str, path: Path, line: int) -> str:
    """A field that must be there and hold text."""
    value = row.get(field)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if field in row else "nothing"
        raise DataError(f"expected text, found {found}", code="E_FIELD", path=path, line=line, field=field)
    return value
