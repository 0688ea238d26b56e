"""The training loop: it learns, is a function of its inputs alone, and survives NaN, interruption and kill -9."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from nomoat.errors import NonFiniteError
from nomoat.train.checkpoint import Checkpoints
from nomoat.train.loop import validation_loss
from nomoat.train.probe import CANDIDATES, SHARE, choose, probe, probe_steps
from nomoat.train.schedule import learning_rate
from toy import ToyModel, toy_trainer


def parameters_digest(trainer: Any) -> str:
    return hashlib.sha256(b"".join(parameter.tobytes() for parameter in trainer.lora.parameters)).hexdigest()


def test_training_lowers_the_validation_loss_and_keeps_the_best() -> None:
    trainer = toy_trainer()
    before = validation_loss(trainer.model, trainer.lora, trainer.validation, None)
    assert trainer.run()
    losses = dict(trainer.progress.losses)
    assert list(losses) == [15, 30, 45, 60]
    assert trainer.progress.best_loss == min(losses.values()) < 0.6 * before
    assert validation_loss(trainer.model, trainer.lora, trainer.validation, None) == trainer.progress.best_loss


def test_gradients_of_packs_add_up_to_the_gradient_of_the_step() -> None:
    """Cut into packs of another size, a step has the same loss and gradient; and the gradient is the slope of the loss."""
    trainer = toy_trainer()
    trainer.lora.parameters[1][...] = np.random.default_rng(0).standard_normal(trainer.lora.parameters[1].shape) * 0.1
    packs = trainer.batches(0)[0]
    loss = trainer.gradients(packs)
    gradient = [array.copy() for array in trainer.lora.gradients]
    assert validation_loss(trainer.model, trainer.lora, packs, None) == pytest.approx(loss, rel=1e-5)
    step = 1e-3
    for parameter, slope in zip(trainer.lora.parameters, gradient, strict=True):
        parameter[1, 1] += step
        up = trainer.gradients(packs)
        parameter[1, 1] -= 2 * step
        down = trainer.gradients(packs)
        parameter[1, 1] += step
        assert (up - down) / (2 * step) == pytest.approx(slope[1, 1], rel=1e-2, abs=1e-4)


def test_the_frozen_stack_is_part_of_the_validation() -> None:
    from nomoat.engine.stack import Stack

    first = toy_trainer()
    first.run()
    base = Stack(first.model.spec, [(first.lora.to_adapter(), 1.0)])
    second = toy_trainer()  # B is zero: on top of the base it changes nothing yet
    alone = validation_loss(second.model, second.lora, second.validation, None)
    together = validation_loss(second.model, second.lora, second.validation, base)
    assert together == pytest.approx(first.progress.best_loss, rel=1e-6)
    assert together < alone


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_does_not() -> None:
    digests = []
    for seed in (3, 3, 4):
        trainer = toy_trainer(options={"seed": seed})
        trainer.run()
        digests.append(parameters_digest(trainer))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("how", ["poisoned", "refused"])
def test_a_step_with_nan_changes_nothing(how: str) -> None:
    model = ToyModel()
    events: list[dict[str, Any]] = []
    trainer = toy_trainer(model, steps=5, validation=())
    first_pack_of_step_3 = sum(len(packs) for packs in trainer.batches(0)[:2]) + 1
    setattr(model, how, frozenset({first_pack_of_step_3}))
    states = []

    def record(event: dict[str, Any]) -> None:
        events.append(event)
        states.append({name: array.copy() for name, array in trainer.arrays().items()})

    trainer.report = record
    assert trainer.run()
    assert [event["event"] for event in events] == ["step", "step", "skipped", "step", "step"]
    assert events[2]["gradient_norm"] is None
    for name in states[1]:
        assert np.array_equal(states[1][name], states[2][name])
        assert np.isfinite(states[4][name]).all()
    assert trainer.progress.skipped == 1
    assert trainer.progress.failures == 0
    assert trainer.optimizer.applied == 4


def test_three_failures_in_a_row_stop_the_run_and_leave_the_last_checkpoint(tmp_path: Path) -> None:
    model = ToyModel()
    checkpoints = Checkpoints(tmp_path, {"run": 1})
    trainer = toy_trainer(model, checkpoints=checkpoints)
    model.poisoned = frozenset(range(11, 1000))
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        trainer.run()
    good = checkpoints.latest()
    assert good is not None
    assert all(np.isfinite(array).all() for array in good.arrays.values())
    assert np.array_equal(good.arrays["parameter.blk.0.o.b"], trainer.lora.parameters[1])


def test_an_exploding_gradient_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(steps=10, validation=(), options={"clip": 0.5})
    honest = trainer.gradients

    def explode(packs: Any) -> float:
        loss = honest(packs)
        if trainer.progress.step == 6:
            trainer.lora.gradients[0] *= 1e4
            trainer.lora.gradients[1] *= 1e4
        return loss

    monkeypatch.setattr(trainer, "gradients", explode)
    assert trainer.run()
    assert trainer.progress.skipped == 1


def test_interruption_writes_a_checkpoint_and_resume_is_exact(tmp_path: Path) -> None:
    whole = toy_trainer()
    whole.run()
    for stop in (1, 14, 15, 31, 59):
        seen: list[int] = []
        arguments: dict[str, Any] = {"options": {"checkpoint_seconds": 1e9}}
        first = toy_trainer(
            checkpoints=Checkpoints(tmp_path / str(stop), {"run": 1}),
            report=lambda event, seen=seen: seen.append(event["step"]),
            interrupted=lambda seen=seen, stop=stop: stop in seen,
            **arguments,
        )
        assert not first.run()
        checkpoints = Checkpoints(tmp_path / str(stop), {"run": 1})
        second = toy_trainer(checkpoints=checkpoints, **arguments)
        checkpoint = checkpoints.latest()
        assert checkpoint is not None
        assert checkpoint.step == stop
        second.restore(checkpoint)
        assert second.run()
        assert parameters_digest(second) == parameters_digest(whole)
        assert second.progress == whole.progress


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    trainer = toy_trainer(checkpoints=Checkpoints(tmp_path / "file", {}), report=events.append, steps=3, validation=())
    (tmp_path / "file").write_text("in the way")
    assert trainer.run()
    assert [event["event"] for event in events] == ["step", "checkpoint_failed", "step", "checkpoint_failed", "step"]
    trainer.progress.step = 2
    with pytest.raises(OSError):
        trainer.checkpoint(final=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_9_twenty_times_gives_the_adapter_of_an_uninterrupted_run(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")  # nothing is imported again: an attempt starts in milliseconds

    def start(run: Path, output: Path) -> tuple[Any, Any]:
        events, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=toy.run, args=(run, output, sender))
        process.start()
        sender.close()
        return process, events

    def digest(folder: Path) -> str:
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    def finish(run: Path, output: Path) -> str:
        process, events = start(run, output)
        process.join(timeout=60)
        events.close()
        assert process.exitcode == 0
        return digest(output)

    expected = finish(tmp_path / "straight", tmp_path / "expected")
    chance = random.Random(5)
    for _ in range(20):
        process, events = start(tmp_path / "killed", tmp_path / "adapter")
        for _ in range(chance.randrange(1, 6)):
            events.recv()
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join(timeout=30)
        events.close()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    assert finish(tmp_path / "killed", tmp_path / "adapter") == expected


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule_rises_then_falls(kind: str) -> None:
    rates = [learning_rate(step, 200, peak=1.0, warmup=0.03, kind=kind) for step in range(200)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:6] == pytest.approx([(i + 1) / 7 for i in range(6)])
    assert rates[6] == 1.0
    assert rates[199] == pytest.approx({"linear": 1 / 194, "cosine": 0.0, "constant": 1.0}[kind], abs=1e-4)
    assert rates[103] == pytest.approx({"linear": 0.5, "cosine": 0.5, "constant": 1.0}[kind])


def test_schedule_of_a_single_step_is_not_zero() -> None:
    assert learning_rate(0, 1, peak=1.0, warmup=0.03, kind="linear") > 0.1


def test_probe_is_deterministic_restores_the_adapter_and_finds_the_scale() -> None:
    found = []
    for _ in range(2):
        trainer = toy_trainer()
        before = parameters_digest(trainer)
        arguments: dict[str, Any] = {"steps": 20, "batches": trainer.batches, "validation": trainer.validation}
        found.append(probe(trainer.model, trainer.lora, trainer.options, **arguments))
        assert parameters_digest(trainer) == before
    assert found[0] == found[1]
    assert found[0] in CANDIDATES[-2:]  # this toy learns best at 0.05, far above all candidates


def test_probe_chooses_the_smallest_of_equals_and_ignores_failures() -> None:
    assert choose({1e-4: 2.0, 2e-4: 1.002, 5e-4: 1.0, 1e-3: 0.999, 2e-3: float("inf")}) == 2e-4
    with pytest.raises(NonFiniteError):
        choose({1e-4: float("nan")})


def test_probe_costs_less_than_a_tenth() -> None:
    assert probe_steps(600) == 0
    for steps in (750, 1000, 12345):
        assert 0 < probe_steps(steps) * len(CANDIDATES) <= SHARE * steps < 0.1 * steps
