"""Checkpoints are complete or not there: killed at any system call, damaged, mixed up, of another run."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nomoat.errors import InputError, NonFiniteError
from nomoat.train.checkpoint import COMMIT, STATE, TENSORS, Checkpoints

IDENTITY = {"data": "d1", "options": {"rank": 8, "targets": ["q", "v"]}, "version": "1"}
WRITE_CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"parameter.a": np.full((3, 2), step, np.float32), "first.a": np.arange(4, dtype=np.float32) + step}


def save(folder: Path, *steps: int, identity: dict[str, Any] = IDENTITY) -> Checkpoints:
    checkpoints = Checkpoints(folder, identity)
    for step in steps:
        checkpoints.save(step, arrays(step), {"step": step, "loss": 0.1 + step})
    return checkpoints


def test_round_trip_is_exact(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = Checkpoints(tmp_path, IDENTITY).latest()
    assert found is not None
    assert (found.step, found.state, found.faults) == (1, {"step": 1, "loss": 1.1}, ())
    for name, array in arrays(1).items():
        assert np.array_equal(found.arrays[name], array)


def test_two_are_kept_and_the_highest_step_wins_whatever_the_times_and_names(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000009", "checkpoint-00000010"]
    (tmp_path / "checkpoint-00000009").rename(tmp_path / "checkpoint-99999999")
    os.utime(tmp_path / "checkpoint-00000010", (1, 1))
    found = Checkpoints(tmp_path, IDENTITY).latest()
    assert found is not None
    assert found.step == 10


def test_killed_at_every_write_the_old_or_the_new_checkpoint_is_there(tmp_path: Path) -> None:
    start = tmp_path / "start"
    save(start, 1, 2)
    outcomes = []
    for stop in range(1, 1000):
        folder = tmp_path / f"killed-{stop}"
        shutil.copytree(start, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads of BLAS
            child = os.fork()
        if child == 0:
            _exit_at_call(stop)
            save(folder, 3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = Checkpoints(folder, IDENTITY).latest()
        assert found is not None
        assert found.step in (2, 3)
        assert np.array_equal(found.arrays["first.a"], arrays(found.step)["first.a"])
        save(folder, 4)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        outcomes.append(found.step)
        if code == 0:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == 2
    assert outcomes[-1] == 3
    assert len(outcomes) > 15  # that many calls were interrupted


def _exit_at_call(stop: int) -> None:
    calls = 0

    def wrap(call: Any) -> Any:
        def counted(*args: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                os._exit(9)
            return call(*args, **keywords)

        return counted

    for name in WRITE_CALLS:
        setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("name", [TENSORS, STATE, COMMIT])
@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "gone", "swapped"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5, 6)
    path = tmp_path / "checkpoint-00000006" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    match damage:
        case "bit":
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case _:
            shutil.copy(tmp_path / "checkpoint-00000005" / name, path)
    found = Checkpoints(tmp_path, IDENTITY).latest()
    assert found is not None
    assert found.step == 5
    if (name, damage) != (COMMIT, "swapped"):  # its record then says step 5, and the true step 5 comes first
        assert any("checkpoint-00000006" in fault for fault in found.faults)
    assert np.array_equal(found.arrays["parameter.a"], arrays(5)["parameter.a"])


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    save(tmp_path, 3)
    other = {"data": "d2", "options": {"rank": 16, "targets": ["q", "v"]}, "version": "1"}
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path, other).latest()
    assert caught.value.code == "E_RESUME"
    assert 'data: "d1" then, "d2" now' in str(caught.value)
    assert "options.rank: 8 then, 16 now" in str(caught.value)
    assert "targets" not in str(caught.value)


def test_named_differences_may_be_allowed(tmp_path: Path) -> None:
    save(tmp_path, 3)
    newer = IDENTITY | {"version": "2"}
    with pytest.raises(InputError, match="version"):
        Checkpoints(tmp_path, newer).latest()
    found = Checkpoints(tmp_path, newer).latest(allow=frozenset({"version"}))
    assert found is not None
    assert found.step == 3


def test_nan_is_never_written(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 3)
    with pytest.raises(NonFiniteError, match=r"parameter\.a"):
        checkpoints.save(4, {"parameter.a": np.array([1, np.nan], np.float32)}, {"step": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000003"]


def test_pickles_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001").mkdir()
    (tmp_path / "checkpoint-00000001" / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert Checkpoints(tmp_path, IDENTITY).latest() is None
    assert Checkpoints(tmp_path, IDENTITY).exists() is None


@pytest.mark.parametrize(
    "commit",
    [
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 1}',
        json.dumps({"format": 1, "step": 2**63, "identity": IDENTITY, "files": {}}).encode(),
        json.dumps({"format": 1, "step": "4", "identity": IDENTITY, "files": {}}).encode(),
        json.dumps({"format": 2, "step": 4, "identity": IDENTITY, "files": {}}).encode(),
        json.dumps({"format": 1, "step": 4, "identity": IDENTITY, "files": {}}).encode(),
        json.dumps({"format": 1, "step": 4, "identity": IDENTITY, "files": {TENSORS: 1, STATE: None}}).encode(),
        b"\xff\xfe",
    ],
)
def test_a_nonsense_commit_record_is_passed_over(tmp_path: Path, commit: bytes) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-00000003", tmp_path / "checkpoint-00000004")
    (tmp_path / "checkpoint-00000004" / COMMIT).write_bytes(commit)
    found = Checkpoints(tmp_path, IDENTITY).latest()
    assert found is not None
    assert found.step == 3
    assert "checkpoint-00000004" in found.faults[0]


def test_clear_removes_all(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 3, 4)
    assert checkpoints.exists() == 4
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
    assert Checkpoints(tmp_path / "absent", IDENTITY).latest() is None
