"""`nomoat bench`: peaks, bandwidth, and the work that is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nomoat import _native, settings
from nomoat.bench import roofline, speed
from nomoat.engine.model import Model
from tiny import tiny_llama

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bench") / "tiny.gguf")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SHORT", 0.001)
    monkeypatch.setattr(roofline, "REPEATS", 1)
    monkeypatch.setattr(roofline, "WORKING_SETS", (1 << 14, 1 << 18))


@pytest.mark.parametrize("level", _native.usable_levels())
def test_peaks_count_multiply_adds_and_grow_with_steps(level: str) -> None:
    before = _native.level()
    _native.set_level(level)
    try:
        for kind in roofline.KINDS:
            one, many = _native.peak(kind, 1), _native.peak(kind, 1000)
            assert many == 1000 * one
            assert one > 0 or kind == "int16"
    finally:
        _native.set_level(before)


def test_a_peak_must_be_known() -> None:
    with pytest.raises(ValueError, match="int4"):
        _native.peak("int4", 1)
    with pytest.raises(ValueError, match="steps"):
        _native.peak("int8", 0)


def test_a_product_is_not_faster_than_the_peak() -> None:
    """Otherwise what is counted or what is timed would be wrong."""
    rows, side, f32 = 96, 512, 0
    before = _native.threads()
    _native.set_threads(1)
    try:
        weight = np.empty(_native.packed_bytes(f32, side, side), np.uint8)
        _native.pack(f32, side, side, np.ones((side, side), np.float32).view(np.uint8).reshape(-1), weight)
        x, y = np.ones((rows, side), np.float32), np.zeros((rows, side), np.float32)

        def product(times: int) -> float:
            for _ in range(times):
                _native.product(f32, side, side, weight, x, y, "f32")
            return float(times * rows * side * side)

        shares = [roofline.best_rate(product) / roofline.multiply_adds("f32") for _ in range(5)]
    finally:
        _native.set_threads(before)
    # what else runs here moves each of the two: a wrong count would show in all five
    assert any(0.1 < share < 1.2 for share in shares), shares


def test_small_working_sets_are_read_faster_than_large_ones() -> None:
    assert any(roofline.read_bandwidth(1 << 14) > roofline.read_bandwidth(256 << 20) for _ in range(5))


@pytest.mark.usefixtures("quick")
def test_roofline(run: Run) -> None:
    code, out, _ = run("bench", "roofline", "--json")
    found = json.loads(out)
    assert code == 0 and found["level"] == _native.level() and _native.threads() == settings.threads()
    assert found["peaks"][0]["threads"] == 1
    for row in found["peaks"]:
        assert row["multiply_adds"]["f32"] > 0 and all(rate > 0 for rate in row["read"].values())
    code, out, _ = run("bench", "roofline")
    assert code == 0 and "10^9 multiply-adds/s" in out and "16 KB" in out and "1 thread " in out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("work", "options", "stages"),
    [
        ("decode", ("--prompt", 5, "--tokens", 3), {"head", "attention", "down"}),
        ("prefill", ("--tokens", 20), {"head", "attention", "gate, up"}),
        ("batch", ("--streams", 3, "--adapters", 2, "--rank", 4, "--prompt", 4, "--tokens", 2), {"head", "adapters"}),
        ("train", ("--rows", 2, "--length", 16, "--rank", 4), {"head: backward", "q, k, v: backward", "attention: backward"}),
    ],
)
def test_work(run: Run, tiny: Path, work: str, options: tuple[str | int, ...], stages: set[str]) -> None:
    arguments = ("bench", work, tiny, "--rounds", 2, *options)
    code, out, _ = run(*map(str, arguments), "--json")
    found = json.loads(out)
    assert code == 0 and len(found["rates"]) == 2 and found["tokens_per_second"] > 0
    assert stages <= set(found["stages"]) and abs(sum(found["stages"].values()) - found["seconds"]) < 1e-6
    assert set(found["shares"]) == set(found["limits"]) and all(len(limits) == 2 for limits in found["limits"].values())
    code, out, _ = run(*map(str, arguments))
    assert code == 0 and "tokens/s" in out and "would allow alone" in out and "rest" in out


def test_the_share_of_a_limit_is_the_median_of_what_each_round_had_of_it() -> None:
    limits = iter([10.0, 40.0, 10.0])
    seconds = iter([9.0, 1.0, 0.5, 1.0])  # the first round does not count
    rates, found = speed.in_turns(lambda: next(seconds), 8, 3, {"memory": lambda: next(limits)})
    assert rates == [8.0, 16.0, 8.0] and found == {"memory": [10.0, 40.0, 10.0]}
    measured = speed.Speed("decode", rates, 1.0, 1.0, found, 1.0)
    assert measured.shares == {"memory": 0.8}  # of 0.8, 0.4, 0.8


def test_more_tokens_than_the_context_are_refused(run: Run, tiny: Path) -> None:
    code, _, err = run("bench", "prefill", tiny, "--tokens", 1_000_000)
    assert code == 2 and "1,000,000 tokens" in err


def test_dense_packs_hold_rows_that_share_no_beginning() -> None:
    packs = speed.dense_packs(list(range(40, 60)), rows=5, length=8, max_tokens=16)
    assert [pack.rows for pack in packs] == [16, 16, 8]
    firsts = [int(pack.tokens[start]) for pack in packs for start in pack.starts[:-1]]
    assert len(set(firsts)) == 5


def test_the_weights_of_a_token_are_those_of_the_file(tiny: Path) -> None:
    model = Model.load(tiny)
    linears = sum(np.prod(model.spec.linear_shape(target, layer)) for layer, target in model.spec.places())
    assert model.spec.active_linears() == linears
    assert 0 < speed.weight_bytes(model) <= sum(tensor.data.nbytes for tensor in model.weights.tensors.values())


def test_a_random_adapter_changes_the_logits(tiny: Path) -> None:
    model = Model.load(tiny)
    plain, other = model.logits([1, 2, 3]), model.logits([1, 2, 3], stack=speed.random_stack(model.spec, 4, 1))
    assert float(np.abs(plain - other).max()) > 1e-3
