"""The command line's frame: help, version, exit codes, error output, start-up time. Each command has tests of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from nomoat import __version__, cli
from nomoat.errors import (
    AdapterError,
    DataError,
    FileFormatError,
    InputError,
    ModelError,
    NetworkError,
    NomoatError,
    NonFiniteError,
    NotFoundError,
    ResourceError,
    SandboxError,
    TemplateError,
)

HELP_SECONDS = 0.150  # the budget of DESIGN section 10


def run(*arguments: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "nomoat"] if script is None else ["-c", script]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Put a function behind `nomoat probe` (with a `--json` flag)."""

    def install(body: Callable[[], object]) -> None:
        @click.command("probe")
        @click.option("--json", "as_json", is_flag=True)
        def probe(as_json: bool) -> object:
            return body()

        module = types.ModuleType("probe_module")
        module.command = probe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_module", "A command that this test made."))

    return install


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> object:
        raise error

    return body


def test_help_lists_every_command_with_its_line() -> None:
    outcome = run("--help")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    for name, (_, text) in cli.COMMANDS.items():
        line = next(line for line in outcome.stdout.splitlines() if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1] == text


def test_without_arguments_shows_help_and_fails() -> None:
    outcome = run()
    assert outcome.returncode == 2
    assert "Commands:" in outcome.stdout + outcome.stderr


def test_version() -> None:
    assert run("--version").stdout == f"nomoat, version {__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_of_the_table_answers_help(name: str) -> None:
    outcome = run(name, "--help")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(f"Usage: nomoat {name}")


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from nomoat.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    loaded = eval_list(run(script=script).stderr)
    heavy = {"numpy", "tokenizers", "jinja2", "huggingface_hub", "rich", "gguf", "safetensors", "psutil", "nomoat._native"}
    assert not heavy & loaded
    assert not {module for module, _ in cli.COMMANDS.values()} & loaded


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = eval_list(run(script="import sys, nomoat; print(sorted(sys.modules), file=sys.stderr)").stderr)
    assert "nomoat" in loaded
    assert not {name for name in loaded if name.startswith("nomoat.")}
    assert not {"numpy", "click", "rich"} & loaded


def eval_list(text: str) -> set[str]:
    return set(json.loads(text.strip().splitlines()[-1].replace("'", '"')))


def test_help_starts_within_its_budget() -> None:
    # Processor time, not wall time: other tests run on the other core. Twice the budget, for slower machines.
    def processor_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = min(processor_seconds() for _ in range(5))
    assert best < 2 * HELP_SECONDS, f"`nomoat --help` took {best * 1000:.0f} ms of processor time"


ERRORS: list[tuple[NomoatError, int, str]] = [
    (NomoatError("broken"), 1, "E_INTERNAL"),
    (InputError("wrong"), 2, "E_INPUT"),
    (FileFormatError("bad magic", code="E_MAGIC", path="m.gguf", offset=0), 2, "E_MAGIC"),
    (DataError("no messages", path="rows.jsonl", line=3), 2, "E_DATA"),
    (ModelError("unknown"), 2, "E_ARCH"),
    (AdapterError("other base"), 2, "E_ADAPTER"),
    (TemplateError("endless"), 2, "E_TEMPLATE"),
    (NotFoundError("no such model"), 2, "E_NOT_FOUND"),
    (ResourceError("needs 9 GB"), 3, "E_RESOURCE"),
    (NetworkError("offline"), 4, "E_NETWORK"),
    (NonFiniteError("NaN loss"), 5, "E_NONFINITE"),
    (SandboxError("no bubblewrap"), 6, "E_SANDBOX"),
]


@pytest.mark.parametrize(("error", "exit_code", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_becomes_its_exit_code_and_one_line(
    error: NomoatError,
    exit_code: int,
    code: str,
    command: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(raising(error))
    assert cli.main(["probe"]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"nomoat: {error} [{code}]\n"

    assert cli.main(["probe", "--json"]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": {"code": code, "message": str(error), "exit_code": exit_code}}


def test_the_table_of_errors_is_complete() -> None:
    def tree(kind: type[NomoatError]) -> set[type[NomoatError]]:
        return {kind}.union(*(tree(child) for child in kind.__subclasses__() if child.__module__ == "nomoat.errors"))

    assert {type(error) for error, _, _ in ERRORS} == tree(NomoatError)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (MemoryError(), 3),
        (OSError(28, "No space left on device", "adapter.safetensors"), 3),
        (click.exceptions.Exit(7), 7),
    ],
)
def test_other_ends(error: BaseException, exit_code: int, command: Callable[[Callable[[], object]], None]) -> None:
    command(raising(error))
    assert cli.main(["probe"]) == exit_code


def test_a_bug_keeps_its_traceback(command: Callable[[Callable[[], object]], None]) -> None:
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


@pytest.mark.parametrize("arguments", [["nosuch"], ["--nosuch"], ["--threads", "0", "models"], ["run", "--nosuch"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: nomoat" in capsys.readouterr().err

    assert cli.main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "E_USAGE"


def test_json_after_a_double_dash_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["nosuch", "--", "--json"]) == 2
    assert "Usage: nomoat" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    script = tmp_path / "writer.py"
    script.write_text(
        "import sys, types, click\n"
        "from nomoat import cli\n"
        "module = types.ModuleType('writer')\n"
        "@click.command()\n"
        "def command():\n"
        "    for _ in range(100_000):\n"
        "        click.echo('a line of output')\n"
        "module.command = command\n"
        "sys.modules['writer'] = module\n"
        "cli.COMMANDS['writer'] = ('writer', '')\n"
        "sys.exit(cli.main(['writer']))\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"a line of output\n"
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 141


def test_global_options_reach_the_settings(
    command: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nomoat import settings

    monkeypatch.setenv(settings.OFFLINE_VARIABLE, "0")
    monkeypatch.setenv(settings.THREADS_VARIABLE, "1")
    seen: list[tuple[bool, int]] = []
    command(lambda: seen.append((settings.offline(), settings.threads())))
    assert cli.main(["probe"]) == 0
    assert cli.main(["--offline", "--threads", "3", "probe"]) == 0
    assert seen == [(False, 1), (True, 3)]
    assert os.environ[settings.OFFLINE_VARIABLE] == "1"
