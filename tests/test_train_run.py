"""The whole job on a tiny model: before, train, after, package; interruption, resume, and every refusal."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import nomoat
from nomoat import settings
from nomoat.adapters.open import open_model
from nomoat.adapters.package import load_adapter
from nomoat.cli import main
from nomoat.data.readers import read_examples
from nomoat.errors import InputError, NomoatError
from nomoat.evals.run import evaluate
from nomoat.hub.fit import Machine
from nomoat.train.checkpoint import Checkpoints
from nomoat.train.job import Job, TrainResult
from tiny import tiny_llama

ANSWERS = ("red", "green", "blue", "tin")
OPTIONS: dict[str, Any] = {
    "rank": 8,
    "learning_rate": 0.01,
    "epochs": 2,
    "batch_sequences": 4,
    "max_tokens": 128,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes half a second each time; test_hub_fit.py does it once."""
    free = Machine(memory=1 << 40, available=1 << 40, disk_free=1 << 40, threads=2, bf16_flops=1e12, read_bandwidth=1e10)
    monkeypatch.setattr("nomoat.train.run.this_machine", lambda folder, threads: free)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 questions whose answer follows from their first word."""
    path = tmp_path_factory.mktemp("data") / "My Rows.jsonl"
    lines = []
    for i in range(40):
        ask, answer = f"{'abcd'[i % 4]} {i}", ANSWERS[i % 4]
        lines.append(json.dumps({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def digest(result: TrainResult) -> str:
    assert result.path is not None
    return hashlib.sha256((result.path / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_train_improves_the_score_and_saves_a_package(base: str, rows: Path) -> None:
    events: list[dict[str, Any]] = []
    result = nomoat.train(base, rows, name="colours", metric="loss", report=events.append, **OPTIONS)
    assert result.before is not None
    assert result.after is not None
    assert result.after.score < 0.7 * result.before.score
    assert result.after.n == 2  # 5 % of 40 are held out
    assert result.tokens_per_second > 0
    kinds = [event["event"] for event in events if event["event"] not in ("scoring", "checkpoint")]
    assert kinds[:5] == ["inspected", "plan", "before", "learning_rate", "step"]
    assert kinds[-2:] == ["after", "saved"]
    assert kinds.count("step") == result.plan.steps == 20
    assert all("eta_seconds" in event and "memory_mb" in event for event in events if event["event"] == "step")
    model, stack = open_model(f"{base}+colours")
    assert result.path is not None
    assert model.template is not None
    adapter, manifest = load_adapter(result.path, model.spec, base=model.fingerprint)
    assert stack is not None
    assert stack.adapters[0][0].digest == adapter.digest
    assert manifest["data"]["learned"] == 38
    assert manifest["recipe"]["learning_rate"] == 0.01
    assert manifest["evaluation"]["after"][0] == result.after.score
    assert manifest["chat_template"] == model.template.source
    assert not list((settings.runs_dir() / "colours").glob("checkpoint-*"))


def test_same_bytes_again_with_other_threads_and_after_an_interruption(base: str, rows: Path) -> None:
    one = digest(nomoat.train(base, rows, name="one", metric="none", threads=1, **OPTIONS))
    two = digest(nomoat.train(base, rows, name="two", metric="none", threads=2, **OPTIONS))
    assert one == two

    def stop_at(step: int) -> Any:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return report

    for step in (1, 9, 17):
        resume = step > 1
        result = nomoat.train(base, rows, name="three", metric="none", resume=resume, report=stop_at(step), **OPTIONS)
        assert result.interrupted == signal.SIGTERM
        assert result.path is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(InputError, match="stopped at step 17: add --resume"):
        nomoat.train(base, rows, name="three", metric="none", **OPTIONS)
    with pytest.raises(InputError, match=r"options\.rank: 8 then, 4 now"):
        nomoat.train(base, rows, name="three", metric="none", resume=True, **(OPTIONS | {"rank": 4}))
    assert digest(nomoat.train(base, rows, name="three", metric="none", resume=True, threads=1, **OPTIONS)) == one


def test_a_kill_between_saving_and_tidying_up(base: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(self: Checkpoints) -> None:
        raise Killed

    arguments: dict[str, Any] = {"name": "a", "metric": "none"} | OPTIONS | {"epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_find_checkpoint", lambda self: None)
        patch.setattr(Checkpoints, "clear", kill)
        with pytest.raises(Killed):
            nomoat.train(base, rows, **arguments)
    weights = settings.adapters_dir() / "a" / "adapter_model.safetensors"
    saved = weights.read_bytes()
    assert nomoat.train(base, rows, resume=True, **arguments).path == weights.parent
    assert weights.read_bytes() == saved
    for resume in (False, True):
        with pytest.raises(InputError, match="an adapter named a exists"):
            nomoat.train(base, rows, resume=resume, **arguments)


def test_resume_with_other_rows_is_refused(base: str, rows: Path, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)

    assert nomoat.train(base, rows, name="a", metric="none", report=stop, **OPTIONS).interrupted == signal.SIGINT
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("green", "grey"))
    with pytest.raises(InputError, match="data:") as caught:
        nomoat.train(base, other, name="a", metric="none", resume=True, **OPTIONS)
    assert caught.value.code == "E_RESUME"


def test_an_adapter_on_top_of_an_adapter(base: str, rows: Path) -> None:
    nomoat.train(base, rows, name="first", metric="none", **OPTIONS)
    frozen = (settings.adapters_dir() / "first" / "adapter_model.safetensors").read_bytes()
    result = nomoat.train(f"{base}+first@0.5", rows, name="second", metric="loss", **(OPTIONS | {"epochs": 1}))
    assert result.before is not None
    assert result.after is not None
    assert result.after.score < result.before.score
    assert (settings.adapters_dir() / "first" / "adapter_model.safetensors").read_bytes() == frozen
    model, _ = open_model(base)
    assert result.path is not None
    _, manifest = load_adapter(result.path, model.spec)
    assert [(parent["name"], parent["weight"]) for parent in manifest["parents"]] == [("first", 0.5)]
    _, stack = open_model(f"{base}+first@0.5+second")
    again = evaluate(
        model, [row for row in read_examples(rows) if row.line in {r.line for r in result.after.records}], "loss", stack=stack
    )
    assert again.score == result.after.score


def test_command_prints_json_lines_and_refuses_a_name_in_use(base: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", base, str(rows), "--rank", "4", "--lr", "0.01", "--max-steps", "3", "--metric", "exact", "--json"]
    assert main(arguments) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done"
    assert events[-1]["name"] == "my-rows"
    assert 0 <= events[-1]["before"] <= 1
    assert main(arguments) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "E_DUP"
    assert main([*arguments, "--overwrite"]) == 0


def test_command_for_people(base: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", base, str(rows), "--name", "t", "--rank", "4", "--max-steps", "3", "--metric", "loss"]) == 0
    text = capsys.readouterr().out
    for part in ("40 used", "[[", "plan: 38 rows to learn, 2 held out; 3 steps", "before: loss", "step 3/3", "after: loss", "+t"):
        assert part in text
    assert main(["adapters"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["adapters", "show", "t"]) == 0
    shown = capsys.readouterr().out
    assert "rank 4, alpha 32" in shown
    assert "38 rows" in shown
    assert main(["adapters", "rm", "t"]) == 0
    assert main(["adapters", "show", "t"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--lr", "nan"], "E_LIMIT"),
        (["--lr", "0"], "E_LIMIT"),
        (["--rank", "0"], "E_LIMIT"),
        (["--rank", "64"], "E_LIMIT"),
        (["--targets", "q,x"], "E_LIMIT"),
        (["--batch", "0"], "E_LIMIT"),
        (["--context", "100000"], "E_LIMIT"),
        (["--name", "../x"], "E_PATH"),
        (["--test", "absent.jsonl"], "E_NOT_FOUND"),
        (["--allow", "data"], "E_LIMIT"),
        (["--max-tokens", "0"], "E_LIMIT"),
    ],
)
def test_wrong_options_write_nothing(
    base: str, rows: Path, home: Path, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", base, str(rows), *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == code
    assert not (home / "data" / "adapters").exists()
    assert not (home / "data" / "runs").exists()


def test_dry_run_and_a_declined_plan_write_nothing(base: str, rows: Path, home: Path) -> None:
    assert nomoat.train(base, rows, dry_run=True, **OPTIONS).plan.steps == 20
    assert nomoat.train(base, rows, confirm=lambda: False, **OPTIONS).path is None
    assert not (home / "data" / "adapters").exists()
    assert not (home / "data" / "runs").exists()


def test_a_missing_model_or_file_is_one_error(rows: Path) -> None:
    for base, data in (("./absent.gguf", rows), ("./absent.gguf", Path("absent.jsonl"))):
        with pytest.raises(NomoatError, match="absent"):
            nomoat.train(base, data)
