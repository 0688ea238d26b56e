"""The cache of packed weights: the least recently used pack goes first, one in use stays."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat import settings
from nomoat.engine import packs, weights
from nomoat.engine.model import Model
from nomoat.errors import InputError


def pack(folder: Path, name: str, size: int, used: int) -> Path:
    path = folder / f"{name}.pack"
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    old, middle, new = (pack(tmp_path, name, 100, used) for name, used in (("c", 1), ("a", 2), ("b", 3)))
    packs.trim(tmp_path, 300)
    assert old.exists()
    packs.trim(tmp_path, 299)
    assert (old.exists(), middle.exists(), new.exists()) == (False, True, True)
    with middle.open("rb") as file:
        packs.hold(file)
    packs.trim(tmp_path, 100)  # held no longer, but used after `new`
    assert (middle.exists(), new.exists()) == (True, False)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be removed there")
def test_models_in_use_stay_and_others_are_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(settings.CACHE_VARIABLE, "0")
    folder = settings.cache_dir() / "packed"
    first = Model.load(tiny_llama(tmp_path / "first.gguf"))
    mine = set(folder.glob("*.pack"))
    logits = first.logits([5, 6, 7])
    second = Model.load(tiny_llama(tmp_path / "second.gguf", context=128))
    assert mine < set(folder.glob("*.pack"))
    assert len(list(folder.glob("*.pack"))) == 2
    del first, second
    third = Model.load(tiny_llama(tmp_path / "third.gguf", context=64))
    assert len(list(folder.glob("*.pack"))) == 1
    assert not mine & set(folder.glob("*.pack"))
    del third
    assert Model.load(tmp_path / "first.gguf").logits([5, 6, 7]).tobytes() == logits.tobytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of 2 MB are asked for on Linux")
def test_small_packs_are_copied_and_large_ones_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.HOME_VARIABLE, str(tmp_path))
    path = tiny_llama(tmp_path / "model.gguf")
    copied = Model.load(path)
    (packed,) = (settings.cache_dir() / "packed").glob("*.pack")
    where = str(packed)
    in_memory = sum(where in line for line in Path("/proc/self/maps").read_text().splitlines())
    with packed.open("rb") as file, pytest.raises(OSError, match="ends after"):
        weights._copy(file, packed.stat().st_size + 1, mmap.MADV_HUGEPAGE)
    monkeypatch.setattr(weights, "COPIED", packed.stat().st_size - 1)
    mapped = Model.load(path)
    assert in_memory == 1  # the page that keeps it open
    assert sum(where in line for line in Path("/proc/self/maps").read_text().splitlines()) == 3
    assert mapped.logits([5, 6, 7]).tobytes() == copied.logits([5, 6, 7]).tobytes()
    for tensor in (*copied.weights.tensors.values(), *mapped.weights.tensors.values()):
        assert not tensor.data.flags.writeable


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.packed_limit() == 50e9
    for wrong in ("many", "-1", "nan", "1e9"):
        monkeypatch.setenv(settings.CACHE_VARIABLE, wrong)
        with pytest.raises(InputError, match="NOMOAT_CACHE_GB"):
            settings.packed_limit()
    monkeypatch.setenv(settings.CACHE_VARIABLE, "0.5")
    assert settings.packed_limit() == 500_000_000
