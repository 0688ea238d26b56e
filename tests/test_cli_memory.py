"""`run`, `eval` and `train` with a model that exceeds the memory of the machine: refused with the numbers, or said and done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tools.make_model import make

import architectures
from nomoat import settings
from nomoat.adapters.package import load_adapter
from nomoat.cli import main
from nomoat.engine.model import Model
from nomoat.engine.weights import read_spec
from nomoat.hub.fit import Machine, weight_bytes
from nomoat.train import run
from tiny import tiny_llama

#: Less than nothing is left for weights: any model exceeds it.
SMALL = Machine(memory=2 << 30, available=1 << 30, disk_free=1 << 40, threads=1, bf16_flops=1e12, read_bandwidth=1e10)
#: The weights could stay in memory if other programs left it.
BUSY = dataclasses.replace(SMALL, memory=4 << 30, available=1000)
ROOMY = dataclasses.replace(SMALL, memory=1 << 40, available=1 << 40)
ROWS = [{"prompt": f"{'abcd'[i % 4]} {i}", "completion": "ok"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type="Q8_0"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def commands(base: str, rows: str) -> list[list[str]]:
    """Each of the three, as short as it can be."""
    return [
        ["run", base, "Hello", "--max-tokens", "2"],
        ["eval", base, rows, "--metric", "loss"],
        ["eval", base, "--perplexity", rows, "--context", "32"],
        ["train", base, rows, "--name", "x", "--max-steps", "1", "--metric", "none", "--lr", "0.001", "--rank", "2", "--yes"],
    ]


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """`machine` is what is measured before weights are loaded; the plan of training finds room."""
    monkeypatch.setattr("nomoat.memory.this_memory", lambda: machine)
    monkeypatch.setattr(run, "this_machine", lambda folder, threads: ROOMY)


@pytest.mark.parametrize("which", range(4))
def test_refused_before_anything_is_packed(
    base: str, rows: str, which: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, SMALL)
    assert main(commands(base, rows)[which]) == 3
    found = capsys.readouterr()
    assert "this machine has 2.15 GB of memory, of which 2.15 GB are kept for everything else" in found.err
    assert "--larger-than-memory" in found.err
    assert not list((settings.cache_dir() / "packed").glob("*.pack"))


def test_a_mixtral_of_true_size_is_refused_in_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """26 GB of which the disk holds the header."""
    path = make(tmp_path / "mixtral.gguf", "mixtral", "mixtral-8x7b", "Q4_K_M", holes=True)
    assert path.stat().st_size > 26e9
    monkeypatch.setattr("nomoat.memory.this_memory", lambda: dataclasses.replace(SMALL, memory=25_280_000_000))
    assert main(["run", str(path), "Hello"]) == 3
    assert "the packed weights take 27.04 GB; this machine has 25.28 GB of memory" in capsys.readouterr().err
    assert not list((settings.cache_dir() / "packed").glob("*.pack"))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("packed", [False, True])
def test_said_and_done_when_asked_for(
    base: str, rows: str, which: int, packed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the weights are packed already or not."""
    command = commands(base, rows)[which]
    if packed:
        Model.load(base)
    install(monkeypatch, SMALL)
    assert main([*command, "--larger-than-memory"]) == 0
    found = capsys.readouterr()
    assert (found.err + found.out).count("this machine has 2.15 GB of memory") == 1


def test_said_where_other_programs_take_the_memory(
    base: str, rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, BUSY)
    for command in commands(base, rows):
        assert main(command) == 0
        found = capsys.readouterr()
        assert (found.err + found.out).count("of 4.29 GB of memory are free") == 1


def test_nothing_is_said_where_there_is_room(
    base: str, rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, ROOMY)
    for command in commands(base, rows):
        assert main(command) == 0
        found = capsys.readouterr()
        assert "packed weights" not in found.err + found.out


def test_training_plans_no_memory_for_weights_that_are_paged(base: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ROOMY)
    whole, paged = (
        run.train(base, rows, name="x", dry_run=True, rank=2, larger_than_memory=larger).plan.memory_bytes
        for larger in (False, True)
    )
    assert whole - paged == weight_bytes(Path(base).stat().st_size)


def test_a_mixture_larger_than_memory_learns_in_its_experts_and_answers(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so first; the adapter has a part for each expert, and changes the answers' likelihood."""
    base = str(architectures.ROWS["mixtral"].gguf_file(tmp_path / "mixtral.gguf"))
    install(monkeypatch, SMALL)
    options = ["--max-steps", "3", "--metric", "none", "--lr", "0.01", "--rank", "2", "--targets", "q,experts", "--yes"]
    assert main(["train", base, rows, "--name", "x", *options, "--larger-than-memory"]) == 0
    assert capsys.readouterr().out.startswith("the packed weights take 0.8 MB; this machine has 2.15 GB of memory")
    adapter, manifest = load_adapter(settings.adapters_dir() / "x", read_spec(Path(base)))
    assert manifest["targets"] == ["q", "gate", "up", "down"]
    assert all(a.ndim == (2 if target == "q" else 3) for (_, target), (a, _) in adapter.tensors.items())
    losses = []
    for name in (base, f"{base}+x"):
        assert main(["eval", name, rows, "--metric", "loss", "--json", "--larger-than-memory"]) == 0
        losses.append(capsys.readouterr().out)
    assert losses[0] != losses[1]
    assert main(["run", f"{base}+x", "Hello", "--max-tokens", "2", "--larger-than-memory"]) == 0
