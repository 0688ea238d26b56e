"""Checkpoints of a training run, complete or absent.

    <run>/checkpoint-00000120/tensors.safetensors   parameters, moments, best parameters so far
    <run>/checkpoint-00000120/state.json            counters and history
    <run>/checkpoint-00000120/COMMIT.json           written last: run identity, step, and size and sha256 of both files

A folder is filled under a hidden name, read back, synced, then renamed. The order of checkpoints is that of the step in the
COMMIT record of the same run, never that of file times or names. One that fails its digests is passed over, and said so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomoat.engine.stack import Float32
from nomoat.errors import InputError, NomoatError, NonFiniteError, printable
from nomoat.files.atomic import atomic_folder, sweep
from nomoat.files.safetensors import open_safetensors, write_safetensors

TENSORS, STATE, COMMIT = "tensors.safetensors", "state.json", "COMMIT.json"
KEEP = 2
MAX_JSON = 64 << 20
MAX_STEP = 1 << 53


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, read. `faults` says which newer ones were damaged, and why."""

    step: int
    arrays: dict[str, Float32]
    state: dict[str, Any]
    faults: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run in one folder. `identity` is everything that decides the run's numbers, as JSON values."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(_dumps(identity))
        self.saved_step: int | None = None

    def save(self, step: int, arrays: Mapping[str, Float32], state: Mapping[str, Any]) -> Path:
        """Writes one checkpoint and, once it is safe, removes all but the newest two.

        Raises NonFiniteError rather than write NaN or infinity; ResourceError where the disk is full (older ones stay).
        """
        for name, array in arrays.items():
            if not math.isfinite(float(array.sum(dtype=np.float64))) and not np.isfinite(array).all():
                raise NonFiniteError(f"checkpoint at step {step}: {name} holds NaN or infinity; it is not written")
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"checkpoint-{step:08d}"
        with atomic_folder(final) as new:
            write_safetensors(new / TENSORS, arrays, None)
            (new / STATE).write_text(_dumps(state), encoding="utf-8")
            files = {name: _fingerprint(new / name) for name in (TENSORS, STATE)}
            commit = {"format": 1, "step": step, "identity": self.identity, "files": files}
            (new / COMMIT).write_text(_dumps(commit), encoding="utf-8")
        self.saved_step = step
        self._rotate(final)
        return final

    def _rotate(self, newest: Path) -> None:
        """Removes all but the newest `KEEP` of this run; those of no run (no readable COMMIT) go as well."""
        ordered = [path for path, commit in self._commits() if commit["identity"] == self.identity]
        keep = {newest, *ordered[:KEEP]}
        for path in self.folder.glob("checkpoint-*"):
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def latest(self, *, allow: frozenset[str] = frozenset()) -> Checkpoint | None:
        """The newest complete checkpoint; None where there is none.

        `allow` names top-level keys of the identity that may differ. Raises InputError E_RESUME, listing the differences, where
        the checkpoints are of another run.
        """
        sweep(self.folder)
        faults: list[str] = []
        strangers: list[str] = []
        for path, commit in self._commits(faults):
            found = _differences(commit["identity"], self.identity)
            differences = [text for key, text in found if key.partition(".")[0] not in allow]
            if differences:
                strangers = strangers or differences
                continue
            try:
                arrays, state = self._read(path, commit)
            except (NomoatError, OSError, ValueError) as error:
                faults.append(f"{path.name} is damaged ({printable(str(error))}); an older one is used")
                continue
            self.saved_step = commit["step"]
            return Checkpoint(commit["step"], arrays, state, tuple(faults))
        if strangers:
            raise InputError(
                f"the checkpoints in {printable(str(self.folder))} are of another run: {'; '.join(strangers)}. "
                "Resume with what it was started with, or start anew with --overwrite",
                code="E_RESUME",
            )
        return None

    def exists(self) -> int | None:
        """Step of the newest complete-looking checkpoint of any run in the folder, without reading it."""
        return next((int(commit["step"]) for _, commit in self._commits()), None)

    def clear(self) -> None:
        """Removes all checkpoints in the folder."""
        sweep(self.folder)
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        self.saved_step = None

    def _commits(self, faults: list[str] | None = None) -> list[tuple[Path, dict[str, Any]]]:
        """(folder, COMMIT record) of every checkpoint that has one, newest step first."""
        found = []
        for path in sorted(self.folder.glob("checkpoint-*")):
            try:
                commit = json.loads(_read_limited(path / COMMIT))
                whole = isinstance(commit["identity"], dict) and isinstance(commit["files"], dict)
                if (
                    commit["format"] != 1
                    or not whole
                    or not isinstance(commit["step"], int)
                    or not 0 <= commit["step"] <= MAX_STEP
                ):
                    raise ValueError("its COMMIT record is not one of this version")
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                if faults is not None:
                    faults.append(f"{path.name} is not complete ({printable(str(error))}); it is not used")
                continue
            found.append((path, commit))
        return sorted(found, key=lambda item: -item[1]["step"])

    def _read(self, path: Path, commit: Mapping[str, Any]) -> tuple[dict[str, Float32], dict[str, Any]]:
        for name in (TENSORS, STATE):
            if commit["files"].get(name) != _fingerprint(path / name):
                raise ValueError(f"{name} does not have the size and sha256 of its COMMIT record")
        state = json.loads(_read_limited(path / STATE))
        if not isinstance(state, dict) or state.get("step") != commit["step"]:
            raise ValueError(f"{STATE} is of another step than its COMMIT record")
        with open_safetensors(path / TENSORS) as file:
            return {name: np.array(file.array(name), dtype=np.float32) for name in file.tensors}, state


def _differences(theirs: Any, ours: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, text) of each leaf that differs: ("options.rank", "options.rank: 8 then, 16 now")."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}):
            found += _differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if theirs == ours else [(path, f"{printable(path)}: {_short(theirs)} then, {_short(ours)} now")]


def _short(value: object) -> str:
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise ValueError(f"{path.name} is larger than {MAX_JSON:,} bytes")
    return raw


def _dumps(value: Mapping[str, Any]) -> str:
    """Floats survive exactly: Python writes the shortest text that reads back as the same number."""
    return json.dumps(value, sort_keys=True, allow_nan=False)
