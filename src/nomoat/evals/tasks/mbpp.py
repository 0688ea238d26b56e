"""MBPP (Austin et al. 2021, arXiv:2108.07732): small Python tasks in a sentence and three assertions.

Reads the whole set (`mbpp.jsonl`) and the one checked by hand (`sanitized-mbpp.json`). Scored are the paper's test problems,
11 to 510; a base model sees problems 2, 3 and 4 with their solutions first, as in the paper.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nomoat.errors import DataError, printable
from nomoat.evals.tasks.problem import Problem, Task, rows, text_of

SHOWN = (2, 3, 4)
TESTED = range(11, 511)
_DESCRIBE = "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
_FORM = "Answer with one ```python block."
_BEGIN, _DONE = "[BEGIN]\n", "\n[DONE]\n"


def read(path: Path) -> list[Problem]:
    """The test problems of a file. Raises DataError, also where the three that a base model is shown are not there."""
    parsed = [_Row(row, path, line) for line, row in rows(path)]
    shown = {row.number: row for row in parsed if row.number in SHOWN}
    tested = [row for row in parsed if row.number in TESTED]
    if len(shown) < len(SHOWN) or not tested:
        raise DataError(
            f"expected problems {', '.join(map(str, SHOWN))} (shown to base models) and some of "
            f"{TESTED.start} to {TESTED.stop - 1} (scored); use the whole file",
            path=path,
        )
    examples = "".join(f"{shown[n].description}{_BEGIN}{shown[n].solution}{_DONE}" for n in SHOWN)
    return [
        Problem(
            id=f"MBPP/{row.number}",
            line=row.line,
            question=row.description + _FORM,
            beginning=examples + row.description + _BEGIN,
            helpers="",
            opening="",
            entry=row.entry,
            reference=row.solution,
            tests={"helpers": "", "program": "\n".join([*row.setup, *row.tests]) + "\n", "remote": [row.entry]},
        )
        for row in tested
    ]


class _Row:
    """One row of either file."""

    def __init__(self, row: dict[str, Any], path: Path, line: int) -> None:
        self.line = line
        number, tests, imports = row.get("task_id"), row.get("test_list"), row.get("test_imports", [])
        if not isinstance(number, int):
            raise DataError("expected a whole number", code="E_FIELD", path=path, line=line, field="task_id")
        if not _texts(tests) or not tests or not _texts(imports):
            raise DataError("expected assertions as text", code="E_FIELD", path=path, line=line, field="test_list")
        self.number: int = number
        self.tests: list[str] = [_unix(test) for test in tests]
        text = text_of(row, "text" if "text" in row else "prompt", path, line)
        self.description = _DESCRIBE.format(text=text, tests="\n".join(self.tests))
        self.solution = _unix(text_of(row, "code", path, line))
        self.setup: list[str] = [*imports, _unix(row.get("test_setup_code") or "")]
        self.entry = _entry(self.tests[0], self.solution)
        if not self.entry:
            message = f"no function of `code` is called in {printable(self.tests[0][:80])!r}"
            raise DataError(message, code="E_FIELD", path=path, line=line, field="test_list")


def _entry(test: str, solution: str) -> str:
    """The function that an assertion calls and the solution defines: `set(f(x)) == ...` tests f; problem 126 defines `sum`."""
    called = re.findall(r"(?<![\w.])([A-Za-z_]\w*)\s*\(", test)
    defined = set(re.findall(r"^(?:def|class)\s+(\w+)", solution, re.MULTILINE))
    return next((name for name in called if name in defined), "")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


TASK = Task(
    name="mbpp",
    files=("sanitized-mbpp.json", "mbpp.jsonl"),
    origin="mbpp/sanitized-mbpp.json or mbpp/mbpp.jsonl of https://github.com/google-research/google-research",
    read=read,
    stop=("[DONE]",),
)
