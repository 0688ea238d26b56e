"""The command line on hostile model files: exit code 2, one line on stderr, nothing on stdout, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostile import gguf_cases, model_cases, safetensors_cases
from hostile.case import Case
from hostile.gguf_bytes import model
from nomoat import cli

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "vocab_size": 16,
}


def sample(cases: list[Case]) -> list[Case]:
    """The first and the last refused case of every row."""
    rows: dict[str, list[Case]] = {}
    for case in cases:
        if case.codes:
            rows.setdefault(case.row, []).append(case)
    return [case for row in rows.values() for case in dict.fromkeys((row[0], row[-1]))]


def refuse(arguments: list[str], written: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2, in one printable line; return the error's code."""
    before = sorted(p for p in written.rglob("*") if p.is_file())
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("]\n")
    assert err[:-1].isprintable()
    assert cli.main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(p for p in written.rglob("*") if p.is_file()) == before
    error = json.loads(err)["error"]
    assert error["exit_code"] == 2
    return str(error["code"])


@pytest.mark.parametrize("case", sample(list(gguf_cases.cases())), ids=lambda case: case.id)
def test_show_refuses_broken_gguf(case: Case, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(case.data)
    assert refuse(["show", str(tmp_path / "m.gguf")], tmp_path, capsys) in case.codes
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("case", sample(list(safetensors_cases.cases())), ids=lambda case: case.id)
def test_show_refuses_broken_safetensors(case: Case, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(case.data)
    assert refuse(["show", str(tmp_path)], tmp_path, capsys) in case.codes
    assert list(home.rglob("*")) == []


def about_the_vocabulary(case: Case) -> bool:
    """A model with a broken vocabulary can still be described; it is refused when it is loaded."""
    return case.row in ("G43", "G44", "G45") or "token" in case.name or "scores" in case.name


@pytest.mark.parametrize(
    "case", sample([case for case in model_cases.cases() if not about_the_vocabulary(case)]), ids=lambda case: case.id
)
def test_fit_refuses_impossible_models(case: Case, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(case.data)
    assert refuse(["fit", str(tmp_path / "m.gguf")], tmp_path, capsys)
    assert list(home.rglob("*")) == []


def test_show_explains_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same commands accept the file that all the others are made from."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model().build())
    for command in ("show", "fit"):
        assert cli.main([command, str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
