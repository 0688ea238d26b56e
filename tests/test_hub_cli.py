"""pull, models, show, rm and fit as a user and as a script sees them."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_server import local_server
from nomoat.hub.store import Store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_other_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("OLLAMA_MODELS", "HF_HUB_CACHE", "LLAMA_CACHE", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))


def put(name: str, source: Path) -> None:
    """The file under a name of the store, without a copy of its bytes."""
    store = Store()
    with store.writing("test"):
        copy = store.tmp / "copy"
        copy.write_bytes(source.read_bytes())
        store.put(name, (store.add_blob(copy, source.name),), source="test", licence="Apache-2.0")


def test_an_empty_machine(run: Run, home: Path) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert re.search(r"smollm2:135m +98\.4 MB +catalogue", out)
    code, out, _ = run("models", "--json")
    assert [(row["name"], row["path"]) for row in json.loads(out)] == [("smollm2:135m", None)]
    assert not (home / "data").exists(), "looking writes nothing"


@pytest.mark.parametrize("command", [["pull", "smollm2:135m"], ["pull", "hf:org/repo"]])
def test_offline(run: Run, command: list[str]) -> None:
    code, out, err = run("--offline", *command, "--json")
    assert (code, out) == (4, "")
    assert json.loads(err)["error"]["code"] == "E_OFFLINE"


@pytest.mark.parametrize("command", ["show", "fit", "pull", "rm"])
def test_unknown_models(run: Run, command: str) -> None:
    code, out, err = run(command, "smolm2\x1b[31m:135m" if command == "rm" else "smolm2:135m")
    assert (code, out) == (2, "")
    assert "\x1b" not in err
    assert "Traceback" not in err
    if command != "rm":
        assert "Did you mean smollm2:135m?" in err


def test_life_of_a_model(run: Run, smollm2: Path) -> None:
    put("smollm2:135m", smollm2)
    code, out, err = run("--offline", "pull", "smollm2:135m", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] == smollm2.stat().st_size
    path = Path(json.loads(out)["path"])
    assert path.name == smollm2.name
    code, out, err = run("models", "--verify", "--json")
    assert code == 0
    assert "sound" in err
    assert [(row["name"], row["origin"], row["path"]) for row in json.loads(out)] == [("smollm2:135m", "store", str(path))]
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"BAD!")
    code, _, err = run("models", "--verify")
    assert code == 2
    assert "digest" in err
    code, out, _ = run("rm", "smollm2:135m", "--json")
    assert (code, json.loads(out)) == (0, {"removed": ["smollm2:135m"], "bytes": smollm2.stat().st_size})
    assert list(Store().blobs.iterdir()) == []
    code, _, err = run("rm", "smollm2:135m")
    assert code == 2
    assert "nothing was removed" in err


def test_rm_removes_all_or_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    put("one", tmp_path / "m.gguf")
    assert run("rm", "one", "two")[0] == 2
    assert Store().names() == ["one"]
    assert run("rm")[0] == 2
    next(iter(Store().manifests.iterdir())).write_text("damaged")
    assert run("models")[1].count("not a manifest") == 1
    assert run("rm", "one")[0] == 0
    (Store().partial / "x").write_bytes(b"12345")
    assert json.loads(run("rm", "--unfinished", "--json")[1])["bytes"] == 5


def test_show_explains_the_real_model_in_ten_lines(run: Run, smollm2: Path) -> None:
    code, out, _ = run("show", smollm2)
    assert code == 0
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert len(lines) == 10
    assert "30 layers, width 576, 9 heads (3 for keys and values), ffn 1,536, vocabulary 49,152" in lines["architecture"]
    assert lines["size"] == "98.4 MB, 134.5 million parameters"
    assert "attention Q4_1 x 120" in lines["formats"]
    assert "embedding Q8_0 x 1" in lines["formats"]
    assert lines["context"] == "8,192 tokens"
    assert lines["template"].startswith("{% for message in messages %}")
    assert lines["tokens"] == "start <|im_start|>; end <|endoftext|> <|im_end|>"
    assert lines["licence"] == "apache-2.0"
    assert "Chat fits" in lines["here"]


def test_show_as_json(run: Run, smollm2: Path) -> None:
    record: dict[str, Any] = json.loads(run("show", smollm2, "--json")[1])
    assert record["parameters"] == 134_515_008
    assert record["dimensions"]["kv_heads"] == 3
    assert sum(count for types in record["types"].values() for count in types.values()) == 272
    assert record["fit"]["chat_fits"] is True
    assert record["problem"] == ""
    template = json.loads(run("show", smollm2, "--template", "--json")[1])["template"]
    assert template == record["template"]
    assert run("show", smollm2, "--template")[1].strip().endswith("{% endif %}")


def test_fit_with_rows(run: Run, smollm2: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 1200)
    once = json.loads(run("fit", smollm2, "--data", rows, "--json")[1])
    assert once["train_fits"] is True
    assert once["data_tokens"] % 1200 == 0
    assert 1200 * 5 < once["data_tokens"] < 1200 * 60
    code, out, _ = run("fit", smollm2, "--data", rows, "--rank", "8", "--batch-tokens", "512")
    assert code == 0
    assert "1,200 rows" in out
    assert "The data would take about" in out


def test_fit_judges_a_model_before_it_is_fetched(
    run: Run, smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    monkeypatch.setenv("NOMOAT_OFFLINE", "0")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one two three", "completion": "four"}\n' * 20)
    with local_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add_repo("org/repo", {"smollm2-Q4_1.gguf": smollm2.read_bytes()})
        code, out, _ = run("fit", "hf:org/repo", "--data", rows, "--json")
        sent = server.sent
        assert run("--offline", "fit", "hf:org/repo")[0] == 2
    result, local = json.loads(out), json.loads(run("fit", smollm2, "--data", rows, "--json")[1])
    assert code == 0
    assert (result["chat_bytes"], result["data_tokens"]) == (local["chat_bytes"], local["data_tokens"])
    assert result["disk_bytes"] == local["disk_bytes"] + smollm2.stat().st_size
    assert sent < 30e6, "headers only"
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("content", "code"), [(b"", "E_"), (b"GGUF", "E_TRUNCATED"), (b"\x1b[2Jnot a model", "E_MAGIC")])
def test_files_that_are_no_models(run: Run, tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    for command in ("show", "fit"):
        exit_code, out, err = run(command, tmp_path / "m.gguf")
        assert (exit_code, out) == (2, "")
        assert code in err
        assert "\x1b" not in err


def test_a_model_that_cannot_run_is_still_explained(run: Run, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mystery")
    writer.add_name("Odd \x1b[31m one")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, err = run("show", path)
    assert (code, err) == (0, "")
    assert "cannot run" in out
    assert "mystery" in out
    assert "\x1b" not in out
    assert json.loads(run("show", path, "--json")[1])["fit"] is None
    assert run("fit", path)[0] == 2


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from nomoat.cli.pull import progress_display

    with progress_display() as (progress, tell):
        for done in range(1001):
            progress("m", done * 10**6, 10**9)
        progress("m", 10**9, 10**9)
        tell("a note")
    err = capsys.readouterr().err
    assert err.splitlines() == ["m: 0.0 of 1,000.0 MB", "m: 1,000.0 of 1,000.0 MB", "a note"]


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
def test_progress_on_a_terminal_is_a_bar() -> None:
    script = (
        "from nomoat.cli.pull import progress_display\n"
        "with progress_display() as (progress, tell):\n"
        "    progress('model [red]x', 5, 10); progress('model [red]x', 10, 10)\n"
    )
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", script], stderr=secondary, env=environment, check=True, timeout=30)
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(primary, 4096):
            shown += chunk
    except OSError:  # Linux: the terminal has no writer left
        pass
    os.close(primary)
    assert b"model [red]x" in shown
    assert "━".encode() in shown
