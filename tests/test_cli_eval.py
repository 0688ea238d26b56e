"""`nomoat eval`: tables, JSON, comparison, output files, perplexity, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

import nomoat.adapters.open
import scripted
from nomoat.cli.eval import METRICS, command
from nomoat.errors import InputError
from scripted import ScriptedModel

Eval = Callable[..., Result]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    cases = [{"question": f"word {n}?", "answer": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    path.write_text("".join(json.dumps({"prompt": c["question"], "completion": c["answer"]}) + "\n" for c in cases))
    return path


@pytest.fixture
def run_eval(monkeypatch: pytest.MonkeyPatch) -> Eval:
    """`tiny` always says "odd"; `tiny+good` is right; `other` is a second base."""
    scripted.install(monkeypatch)
    loads: list[str] = []

    class TwoFaced(ScriptedModel):
        def logprobs(self, pack: Any, *, stack: Any = None, precision: str = "int8") -> npt.NDArray[np.float32]:
            return super().logprobs(pack) * np.float32(0.5 if stack else 1.0)

    def right(prompt: str) -> str:
        return "even" if int(prompt.split("word ")[1].split("?")[0]) % 2 == 0 else "odd"

    def generate(model: ScriptedModel, prompts: list[list[int]], *rest: Any, stacks: list[object], **others: Any) -> object:
        model.answer = right if stacks[0] else lambda prompt: "odd"
        return original(model, prompts, *rest, **others)

    def open_model(name: str, **_: object) -> tuple[ScriptedModel, object]:
        loads.append(name)
        model = TwoFaced()
        return model, stack_for(model, name)

    def stack_for(_: ScriptedModel, name: str) -> object:
        return object() if "+good" in name else None

    original = scripted.generate
    monkeypatch.setattr("nomoat.engine.generate.generate", generate)
    monkeypatch.setattr(nomoat.adapters.open, "open_model", open_model)
    monkeypatch.setattr("nomoat.cli.fetch.fetch_missing", lambda name: None)
    monkeypatch.setattr(nomoat.adapters.open, "stack_for", stack_for)

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(command, [str(a) for a in arguments])
        result.loads = loads  # type: ignore[attr-defined]
        return result

    return invoke


def test_the_list_of_metrics_is_the_table_of_metrics() -> None:
    from nomoat.evals import metrics

    assert tuple(metrics.METRICS) == METRICS


def test_a_score_with_its_interval_and_wrong_rows(run_eval: Eval, rows: Path) -> None:
    result = run_eval("tiny", rows)
    assert result.exit_code == 0
    assert "50.0 %" in result.stdout
    assert "35.2 to 64.8" in result.stdout  # Wilson, 20 of 40
    assert "line 1" in result.stdout
    assert "word 0?" in result.stdout
    assert "line 1" not in run_eval("tiny", rows, "--show", "0").stdout


def test_json(run_eval: Eval, rows: Path) -> None:
    body = json.loads(run_eval("tiny", rows, "--json", "--limit", "10").stdout)
    scored = body["results"]["tiny"]
    assert (scored["metric"], scored["n"], scored["max_tokens"]) == ("exact", 10, len("even") * 3 // 2 + 8)
    assert scored["low"] <= scored["score"] <= scored["high"]
    assert "records" not in scored


def test_against_says_which_is_better_and_loads_a_shared_base_once(run_eval: Eval, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    result = run_eval("tiny+good", rows, "--against", "tiny", "--output", output)
    assert "Better: +50.0 points" in result.stdout
    assert "20 rows better, 0 worse, 20 the same" in result.stdout
    assert "p < 0.0001" in result.stdout
    assert result.loads == ["tiny"]  # type: ignore[attr-defined]
    assert {json.loads(line)["got"] for line in output.read_text().splitlines()} == {"even", "odd"}
    baseline = (tmp_path / "answers.against.jsonl").read_text()
    assert {json.loads(line)["got"] for line in baseline.splitlines()} == {"odd"}
    assert run_eval("tiny+good", rows, "--against", "other").loads[1:] == ["other", "tiny+good"]  # type: ignore[attr-defined]


def test_markdown(run_eval: Eval, rows: Path) -> None:
    text = run_eval("tiny+good", rows, "--against", "tiny", "--markdown").stdout
    assert "| tiny | exact | 50.0 % |" in text
    assert "| tiny+good | exact | 100.0 % | 91.2 to 100.0 | 40 |" in text


def test_loss(run_eval: Eval, rows: Path) -> None:
    body = json.loads(run_eval("tiny+good", rows, "--metric", "loss", "--against", "tiny", "--json").stdout)
    assert body["results"]["tiny"]["score"] == pytest.approx(1.0)
    assert body["results"]["tiny+good"]["score"] == pytest.approx(0.5)
    assert body["comparison"]["verdict"] == "better"


def test_columns_of_other_names(run_eval: Eval, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,a\nword 1?,odd\nword 2?,even\n")
    body = json.loads(run_eval("tiny", path, "--map", "prompt=q", "--map", "completion=a", "--json").stdout)
    assert body["results"]["tiny"]["score"] == 0.5


def test_perplexity(run_eval: Eval, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("z" * 200)
    assert run_eval("tiny", "--perplexity", path, "--context", "20").stdout.startswith(
        "perplexity 2.7183 ± 0.0000 (90 tokens scored in 10 "
    )
    body = json.loads(run_eval("tiny", "--perplexity", path, "--context", "20", "--stride", "10", "--json").stdout)
    assert (body["tokens"], body["convention"]) == (199, "strided")
    assert body["perplexity"] == pytest.approx(2.71828, rel=1e-5)


def test_wrong_command_lines(run_eval: Eval, rows: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["tiny"], "one of ROWS, --task NAME and --perplexity FILE"),
        (["tiny", rows, "--perplexity", rows], "one of ROWS, --task NAME and --perplexity FILE"),
        (["tiny", rows, "--task", "mbpp"], "one of ROWS, --task NAME and --perplexity FILE"),
        (["tiny", rows, "--k", "1"], "--k needs --task"),
        (["tiny", rows, "--metric", "bleu"], "'bleu' is not one of"),
        (["tiny", rows, "--metric", "loss", "--max-tokens", "3"], "no meaning for --metric loss"),
        (["tiny", rows, "--map", "prompt"], "expected FIELD=COLUMN"),
    ):
        result = run_eval(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert isinstance(run_eval("tiny", rows, "--against", "tiny").exception, InputError)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff")
    for path, code in ((binary, "E_UTF8"), (tmp_path / "missing.txt", "E_PATH")):
        fault = run_eval("tiny", "--perplexity", path).exception
        assert isinstance(fault, InputError)
        assert fault.code == code
