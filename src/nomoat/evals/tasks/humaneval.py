"""HumanEval (Chen et al. 2021, arXiv:2107.03374): 164 functions, given by signature and docstring, tested by assertions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomoat.errors import DataError
from nomoat.evals.tasks.problem import Problem, Task, rows, text_of

_ASK = "Complete this Python function. Answer with the whole function in one ```python block.\n\n```python\n{prompt}```"


def read(path: Path) -> list[Problem]:
    """The problems of HumanEval.jsonl. Raises DataError."""
    return [_problem(row, path, line) for line, row in rows(path)]


def _problem(row: dict[str, Any], path: Path, line: int) -> Problem:
    prompt, entry, tests = (text_of(row, field, path, line) for field in ("prompt", "entry_point", "test"))
    definition = prompt.rfind(f"def {entry}(")
    if not entry.isidentifier() or definition < 0:
        message = f"expected a prompt that ends with the beginning of `def {entry}(`"
        raise DataError(message, code="E_FIELD", path=path, line=line, field="prompt")
    helpers = prompt[:definition]  # imports, and functions that the tests call too
    return Problem(
        id=text_of(row, "task_id", path, line),
        line=line,
        question=_ASK.format(prompt=prompt if prompt.endswith("\n") else prompt + "\n"),
        beginning=prompt,
        helpers=helpers,
        opening=prompt,
        entry=entry,
        reference=prompt + text_of(row, "canonical_solution", path, line),
        tests={"helpers": helpers, "program": f"{tests}\ncheck({entry})\n", "remote": [entry]},
    )


TASK = Task(
    name="humaneval",
    files=("HumanEval.jsonl",),
    origin="data/HumanEval.jsonl.gz of https://github.com/openai/human-eval, unpacked with gunzip",
    read=read,
    stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```"),  # of the paper; a body never reaches the first column
)
