"""What every test gets: its own empty home, no network; and, on request, the real data and the real model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before NumPy is imported: the reference model's BLAS threads and the engine's would take turns on the same cores (10x slower).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The oracles live in an environment of their own (`make parity`).
collect_ignore = [] if importlib.util.find_spec("torch") and importlib.util.find_spec("peft") else ["parity"]


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home that session fixtures write to, for example the packed weights of a model that many tests share."""
    home = tmp_path_factory.mktemp("session") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOMOAT_HOME", str(home))
        patch.setenv("NOMOAT_OFFLINE", "1")
        yield home


@pytest.fixture(autouse=True)
def home(session_home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for each test: what one test writes, no other test sees. Not in `tmp_path`, which the test may list."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NOMOAT_HOME", str(folder))
    monkeypatch.setenv("NOMOAT_OFFLINE", "1")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from nomoat import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: NOMOAT_SHARED_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set NOMOAT_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where bubblewrap is missing or the system forbids it. Where it works, nomoat's sandbox must work too."""
    trivial = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    try:
        outcome = subprocess.run(trivial, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("bubblewrap is not installed; `apt install bubblewrap`")
    if outcome.returncode != 0:
        pytest.skip(f"bubblewrap does not work here: {outcome.stderr.strip()}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: NOMOAT_SMOLLM2 (`make test` sets it), else the copy that `make model` stored."""
    given = os.environ.get("NOMOAT_SMOLLM2")
    if given:
        if not Path(given).is_file():
            pytest.fail(f"NOMOAT_SMOLLM2={given}: no such file")
        return Path(given)
    store = ROOT / "build" / "home"
    if store.is_dir():
        from nomoat.errors import NomoatError
        from nomoat.hub.names import resolve

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOMOAT_HOME", str(store))
            try:
                return resolve("smollm2:135m", offline=True)
            except NomoatError as error:
                pytest.skip(f"{error}; `make model` fetches it")
    pytest.skip("SmolLM2-135M is not here; `make model` fetches it, or set NOMOAT_SMOLLM2 to its GGUF file")
