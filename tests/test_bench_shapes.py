"""bench/shapes.py: a side that trains and says what memory it has, the page, and where files may not go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import shapes
from bench.peers.channel import Side

from tiny import tiny_llama

TINY_WORK = {
    "prefill": ({"tokens": [3, 4, 5, 6]}, 4, ("nomoat", "llama.cpp")),
    "train": ({"tokens": [3, 4, 5, 6], "rank": 2}, 4, ("nomoat",)),
}


def test_a_side_takes_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", vocab=512)
    monkeypatch.setattr(shapes, "WORK", TINY_WORK)
    with Side("bench.peers.nomoat_side") as side:
        side.ask("load", path=str(path), threads=1)
        found = shapes.take_turns({"nomoat": side}, rounds=2)["nomoat"]
        first, second = (side.ask("train", tokens=[3, 4, 5, 6], rank=2)["loss"] for _ in range(2))
    assert set(found["rounds"]) == {"prefill", "train"}
    assert all(len(values) == 2 for values in found["rounds"].values())
    assert found["tokens_per_second"]["prefill"] > 0
    assert 10 < found["rss_mb"] <= found["peak_rss_mb"] * 1.001
    assert 0 < second < first  # it does train


def result(ours: dict[str, float], theirs: dict[str, float], interleaved: bool) -> dict[str, Any]:
    sides = {
        name: {"rss_mb": 5100.0, "peak_rss_mb": 6200.0, "tokens_per_second": speeds}
        for name, speeds in (("nomoat", ours), ("llama.cpp", theirs))
    }
    machine = {"cpu": "CPU", "level": "avx512", "threads": 2, "commit": "abc", "date": "2026-11-22"}
    found = {"type": "Q4_K_M", "bytes": 4_900_000_000, "interleaved": interleaved, "sides": sides, "machine": machine}
    return found | {"llama.cpp": {"version": "0.3.36"}}


def test_the_page_says_what_was_measured() -> None:
    found = result({"prefill": 50.0, "decode": 7.5, "train": 12.0}, {"prefill": 25.0, "decode": 5.0}, interleaved=False)
    page = shapes.page({"Llama-3-8B": found})
    assert "| Llama-3-8B Q4_K_M | 4.9 GB | nomoat | 50.0 | 7.5 | 12.0 | 5.1 GB | 6.2 GB |" in page
    assert "| | | llama.cpp | 25.0 | 5.0 |  | 5.1 GB |  |" in page
    assert "one side after the other" in page
    assert "taking turns" in shapes.page({"Llama-3-8B": {**found, "interleaved": True}})
    assert shapes.ratios(found) == "prefill 50.0 tokens/s (x 2.00), decode 7.5 tokens/s (x 1.50), train 12.0 tokens/s"


def test_models_stay_out_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shapes.main(["--models", str(shapes.ROOT / "build")])
    assert "inside the repository" in capsys.readouterr().err
