"""`nomoat eval --task`: tables, JSON, comparison, files, and everything it refuses before it loads a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import nomoat.adapters.open
import scripted
from nomoat import settings
from nomoat.cli.eval import command
from nomoat.cli.eval_task import TASKS
from nomoat.errors import DataError, InputError, NotFoundError, SandboxError
from scripted import ScriptedModel

Eval = Callable[..., Result]
PROBLEMS = 8


def row(n: int) -> dict[str, Any]:
    """Adds n."""
    return {
        "task_id": f"Toy/{n}",
        "prompt": f'def add{n}(x):\n    """ x plus {n}. """\n',
        "entry_point": f"add{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(100) == {100 + n}\n",
    }


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    path = tmp_path / "toys.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(PROBLEMS)))
    return path


def adds(shift: Callable[[int], int]) -> Callable[[str], str]:
    """A model that adds, or nearly so."""

    def answer(prompt: str) -> str:
        n = int(prompt.rpartition("def add")[2].partition("(")[0])
        code = f"return x + {n + shift(n)}"
        return f"```python\ndef add{n}(x): {code}\n```" if "assistant" in prompt else f"    {code}\n\ndef other(): pass"

    return answer


@pytest.fixture
def run_task(monkeypatch: pytest.MonkeyPatch) -> Eval:
    """`tiny` is right for even numbers, `tiny+good` always; `base` has no chat template and is right."""
    scripted.install(monkeypatch)
    loads: list[str] = []

    def open_model(name: str, **_: object) -> tuple[ScriptedModel, None]:
        loads.append(name)
        model = ScriptedModel(adds(lambda n: 0 if name != "tiny" else n % 2))
        if name == "base":
            model.template = None
        return model, None

    monkeypatch.setattr(nomoat.adapters.open, "open_model", open_model)
    monkeypatch.setattr(nomoat.adapters.open, "stack_for", lambda model, name: setattr(model, "answer", adds(lambda n: 0)))
    monkeypatch.setattr("nomoat.cli.fetch.fetch_missing", lambda name: None)

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(command, [str(a) for a in arguments])
        result.loads = loads  # type: ignore[attr-defined]
        return result

    return invoke


def test_the_list_of_tasks_is_the_table_of_tasks() -> None:
    from nomoat.evals import tasks

    assert tuple(tasks.TASKS) == TASKS


@pytest.mark.usefixtures("bubblewrap")
def test_a_table_with_outcomes_and_reasons(run_task: Eval, toys: Path, tmp_path: Path) -> None:
    result = run_task("tiny", "--task", "humaneval", "--data", toys, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "pass@1" in result.stdout
    assert "50.0 %" in result.stdout
    assert "tiny: 4 passed, 4 failed; tests took" in result.stdout
    assert "Toy/1" in result.stdout
    assert "assert candidate(100) == 101 # got 102" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == [1, 0] * 4


@pytest.mark.usefixtures("bubblewrap")
def test_json_and_a_comparison(run_task: Eval, toys: Path) -> None:
    arguments = ("--task", "humaneval", "--data", toys, "--against", "tiny")
    body = json.loads(run_task("tiny+good", *arguments, "--json").stdout)
    assert body["data"]["file"] == str(toys)
    assert len(body["data"]["sha256"]) == 64
    scores = {name: result["scores"]["pass@1"] for name, result in body["results"].items()}
    assert (scores["tiny"]["score"], scores["tiny+good"]["score"], scores["tiny"]["n"]) == (0.5, 1.0, PROBLEMS)
    assert body["results"]["tiny"]["prompt"] == "chat"
    assert (body["comparison"]["gained"], body["comparison"]["lost"]) == (4, 0)
    text = run_task("tiny+good", *arguments).stdout
    assert "+50.0 points" in text
    assert "| tiny+good | pass@1 | 100.0 % |" in run_task("tiny+good", *arguments, "--markdown").stdout


@pytest.mark.usefixtures("bubblewrap")
def test_several_answers_and_a_base_model(run_task: Eval, toys: Path) -> None:
    arguments = ("--task", "humaneval", "--data", toys, "--samples", "3", "--k", "3,1", "--limit", "2", "--json")
    result = json.loads(run_task("base", *arguments).stdout)["results"]["base"]
    assert (result["prompt"], result["samples"], result["temperature"]) == ("complete", 3, 0.8)
    assert list(result["scores"]) == ["pass@1", "pass@3"]
    assert result["outcomes"]["passed"] == 6
    assert result["scores"]["pass@3"]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "2", "--k", "5"], "--samples 5"),
        (["--k", "0"], "expected whole numbers such as 1,10"),
        (["--k", "1,x"], "expected whole numbers such as 1,10"),
        (["--metric", "exact"], "--metric has no meaning with --task humaneval"),
        (["--stride", "5"], "--stride has no meaning with --task humaneval"),
        (["--time-limit", "0"], "0 is not in the range"),
    ],
)
def test_wrong_command_lines(run_task: Eval, toys: Path, arguments: list[str], message: str) -> None:
    result = run_task("tiny", "--task", "humaneval", "--data", toys, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.loads == []  # type: ignore[attr-defined]


def test_without_a_sandbox_nothing_is_loaded(run_task: Eval, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = run_task("tiny", "--task", "humaneval", "--data", toys)
    assert isinstance(result.exception, SandboxError)
    assert result.loads == []  # type: ignore[attr-defined]


@pytest.mark.usefixtures("bubblewrap")
def test_what_is_missing_is_said_before_a_model_is_loaded(run_task: Eval, toys: Path) -> None:
    missing = run_task("tiny", "--task", "mbpp")
    assert isinstance(missing.exception, NotFoundError)
    assert str(settings.benchmarks_dir() / "sanitized-mbpp.json") in str(missing.exception)
    assert isinstance(run_task("tiny", "--task", "mbpp", "--data", toys).exception, DataError)
    greedy = run_task("tiny", "--task", "humaneval", "--data", toys, "--samples", "2", "--temperature", "0")
    assert isinstance(greedy.exception, InputError)
    assert greedy.loads == []  # type: ignore[attr-defined]
