"""What the comparisons with peers are made of: processes that answer, results on disk, medians and ratios."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from bench import adapters, decode, machine, run, speed_page
from bench.peers.channel import Side, SideError, serve

from nomoat.bench import speed
from nomoat.engine.generate import Sampling, generate
from nomoat.engine.model import Model
from nomoat.engine.weights import read_spec
from tiny import tiny_llama

ECHO = "bench_echo_side"
SOURCE = """
from bench.peers.channel import peak_rss_mb, serve

def double(value):
    print("noise on standard output")
    return {"value": 2 * value, "rss": peak_rss_mb()}

def leave():
    raise SystemExit(3)

serve({"double": double, "leave": leave})
"""


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    (tmp_path / f"{ECHO}.py").write_text(SOURCE, encoding="utf-8")
    with Side(ECHO, sys.executable, env={"PYTHONPATH": str(tmp_path)}) as side:
        yield side


def test_a_side_answers_while_its_process_prints(side: Side) -> None:
    assert [side.ask("double", value=value)["value"] for value in (1, 2.5, "ab")] == [2, 5.0, "abab"]
    assert 1 < side.ask("double", value=0)["rss"] < 10_000


def test_an_error_keeps_the_side_alive(side: Side) -> None:
    with pytest.raises(SideError, match="TypeError"):
        side.ask("double", other=1)
    with pytest.raises(SideError, match="'nothing': KeyError"):
        side.ask("nothing")
    assert side.ask("double", value=4)["value"] == 8


def test_a_side_that_ends_is_an_error(side: Side) -> None:
    with pytest.raises(SideError, match="status 3"):
        side.ask("leave")
    with pytest.raises(SideError, match="status 3"):
        side.ask("double", value=1)


def test_serve_is_what_the_sides_call() -> None:
    for name in ("llamacpp_side", "nomoat_side", "nomoat_train_side", "peft_side", "server_side"):
        source = (machine.ROOT / "bench" / "peers" / f"{name}.py").read_text(encoding="utf-8")
        assert f"{serve.__name__}({{" in source


def test_nomoat_answers_many_requests_each_with_its_adapter(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    prompts = [[3, 4, 5, 6], [7, 8, 9, 10], [3, 4, 5, 6]]
    with Side("bench.peers.nomoat_side") as side:
        side.ask("load", path=str(path), threads=1)
        side.ask("adapters", rank=4, count=2)
        together = side.ask("answers", prompts=prompts, adapters=[0, 1, -1], count=5)["tokens"]
        alone = [side.ask("answers", prompts=[prompts[i]], adapters=[a], count=5)["tokens"][0] for i, a in enumerate((0, 1, -1))]
    assert together == alone and [len(tokens) for tokens in together] == [5, 5, 5]
    model = Model.load(path)
    stacks = [speed.random_stack(model.spec, 4, 0), speed.random_stack(model.spec, 4, 1), None]
    expected = generate(model, prompts, Sampling(max_tokens=5, speculate=False), stacks=stacks)
    assert [answer.tokens for answer in expected] == together


def test_an_adapter_as_gguf_holds_its_matrices(tmp_path: Path) -> None:
    spec = read_spec(tiny_llama(tmp_path / "tiny.gguf"))
    adapter = speed.random_adapter(spec, 4, 0)
    adapters.write_gguf(adapter, spec.architecture, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * len(adapter.tensors)
    assert np.array_equal(found["blk.1.attn_q.weight.lora_a"], adapter.tensors[1, "q"][0])
    assert found["blk.0.ffn_down.weight.lora_b"].shape == (spec.width, 4)
    assert reader.fields["adapter.type"].contents() == "lora" and reader.fields["general.type"].contents() == "adapter"


def test_agreement_is_what_answers_begin_with_alike() -> None:
    assert adapters.agreement(["abcd", "xy"], ["abxd", "xy"]) == 0.75


def test_results_say_what_made_them(tmp_path: Path) -> None:
    found = machine.environment(threads=2)
    assert found["level"] in ("scalar", "avx2", "avx2_vnni", "avx512", "amx", "neon")
    assert found["compiler"].split()[0] in ("GCC", "Clang")
    path = machine.write("figures", {"machine": found, "text": "é"}, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"machine": found, "text": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_the_compiler_is_read_from_the_library(tmp_path: Path) -> None:
    for content, expected in {
        b"\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0": "GCC 12.2.0",
        b"\0Debian clang version 19.1.4 (1~deb12u1)\0": "Clang 19.1.4",
        b"nothing of the kind": "unknown",
    }.items():
        (tmp_path / "library.so").write_bytes(content)
        assert machine.compiler(tmp_path / "library.so") == expected


class Fixed:
    """Answers with times that were set beforehand."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def ask(self, op: str, **values: object) -> dict[str, float]:
        return {"seconds": self.seconds.pop(0)}


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    own, peer = Fixed([9, 9, 1, 1, 2, 2, 1, 1]), Fixed([9, 9, 4, 2, 4, 2, 4, 2])
    speeds = decode.measure({"nomoat": own, "llama.cpp": peer}, rounds=3, works=["decode", "prefill"])  # type: ignore[dict-item]
    assert speeds["decode"] == {"nomoat": [64, 32, 64], "llama.cpp": [16, 16, 16]}
    found = {work: decode.summary(values) for work, values in speeds.items()}
    assert found["decode"] == {"tokens_per_second": {"nomoat": 64, "llama.cpp": 16}, "ratio": {"llama.cpp": 4}}
    assert found["prefill"]["ratio"] == {"llama.cpp": 2}
    assert "x 4.00 of llama.cpp" in decode.table(found)


def test_figures_of_other_files_stay_and_the_page_shows_all(tmp_path: Path) -> None:
    machine_ = {"cpu": "C", "level": "avx2", "threads": 2, "compiler": "GCC 12.2.0", "commit": "abc", "date": "2026-01-01"}
    both = {"decode": decode.summary({"nomoat": [30.0], "llama.cpp": [10.0]})}
    alone = {"streams-4": decode.summary({"ik_llama.cpp": [20.0]})}
    first = {"work": both, "machine": machine_, "peers": {"llama.cpp": {"version": "1.2"}}}
    machine.write("decode", decode.with_model("a.gguf", first, tmp_path), tmp_path)
    found = decode.with_model("b.gguf", {"work": alone, "machine": machine_, "peers": {}}, tmp_path)
    assert list(found["models"]) == ["a.gguf", "b.gguf"]
    text = speed_page.page({"avx2": found})
    assert "| decode | 30.0 | 10.0 (x 3.00) |" in text
    assert "| streams-4 | 20.0 |" in text
    assert "\n## b.gguf, avx2\n" in text
    assert "llama.cpp by bindings 1.2." in text


def test_every_number_of_streams_counts_all_its_tokens() -> None:
    assert {name: tokens for name, (_, _, tokens) in decode.WORK.items() if name.startswith("streams")} == {
        "streams-4": 64,
        "streams-8": 128,
        "streams-16": 256,
        "streams-32": 512,
    }


def test_a_missing_peer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, absent = tmp_path / "python", tmp_path / "absent"
    here.touch()
    table: dict[str, tuple[list[str], tuple[Path, str] | None]] = {
        "a": ([], (here, "make one")),
        "b": ([], (absent, "make two")),
        "c": ([], None),
        "d": ([], (absent, "make two")),
    }
    monkeypatch.setattr(run, "COMPARISONS", table)
    assert run.missing(["a", "c"]) == []
    assert run.missing(["a", "b", "c", "d"]) == ["make two"]


def test_every_comparison_has_its_script() -> None:
    for arguments, _ in run.COMPARISONS.values():
        assert (machine.ROOT / "bench" / arguments[0]).is_file()
    assert set(run.USUAL) <= set(run.COMPARISONS)
