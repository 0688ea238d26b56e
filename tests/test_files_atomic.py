"""Files appear whole or not at all: after errors, kills, and a disk that fills up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nomoat.errors import InputError, ResourceError
from nomoat.files.atomic import atomic_folder, atomic_write, sweep

SOURCE = str(Path(__file__).resolve().parent.parent / "src")


def run(program: str, folder: Path) -> subprocess.Popen[bytes]:
    """A Python program that can import nomoat, with `folder` as its argument."""
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], env={"PYTHONPATH": SOURCE}, stdout=subprocess.PIPE)


def test_writes_and_replaces(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with atomic_write(tmp_path / "f") as file:
            file.write(text)
        assert (tmp_path / "f").read_bytes() == text
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_old_content_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_the_old_file_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    def fill() -> None:
        with atomic_folder(tmp_path / "d") as folder:
            (folder / "x").write_bytes(b"half")
            raise error

    for act in (write, fill):
        with pytest.raises(error):
            act()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_order_of_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, rename, fsync of the folder: any other order can lose the file on power loss."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to tell files from folders")
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    with atomic_write(tmp_path / "f") as file:
        file.write(b"x")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_failed_fsync_is_raised_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails in the same place."""
    program = """
import resource, signal, sys
from pathlib import Path
from nomoat.errors import ResourceError
from nomoat.files.atomic import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1]) / "f"
path.write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with atomic_write(path) as file:
        file.write(b"x" * 100_000)
except ResourceError as error:
    print(error.code, path.read_bytes().decode(), len(list(path.parent.iterdir())))
"""
    child = run(program, tmp_path)
    assert child.communicate(timeout=20)[0].split() == [b"E_DISK", b"old", b"1"]
    assert ResourceError("x").exit_code == 3


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "f", Path("/dev/null/f"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError) as caught, atomic_write(path) as file:
            file.write(b"x")
        assert caught.value.code == "E_PATH"
    assert list(tmp_path.iterdir()) == []


def test_long_names_fit(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    with atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_folder_replaces_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / "d") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
        assert [p.name for p in (tmp_path / "d" / "sub").iterdir()] == [name]
        assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_folder_takes_no_file_and_keeps_links(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(InputError) as caught, atomic_folder(tmp_path / "f"):
        pass
    assert caught.value.code == "E_PATH"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "real" / "x").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "link", "real"]


def test_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    """A reader in a loop beside a writer in a loop sees a complete folder every time."""
    if sys.platform not in ("linux", "darwin"):
        pytest.skip("no call that exchanges two names on this system")
    program = """
import sys
from pathlib import Path
from nomoat.files.atomic import atomic_folder
for i in range(150):
    with atomic_folder(Path(sys.argv[1]) / "d") as folder:
        (folder / "f").write_text("whole")
    if i == 0:
        print("ready", flush=True)
"""
    child = run(program, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    reads = 0
    while child.poll() is None:
        # Fails with FileNotFoundError in any instant without a folder of that name.
        descriptor = os.open(tmp_path / "d", os.O_RDONLY | os.O_DIRECTORY)
        os.close(descriptor)
        reads += 1
    assert child.communicate()[0] == b""
    assert child.returncode == 0
    assert reads > 10


def test_fallback_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange two names, three renames do."""

    class Nothing:
        pass

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Nothing())
    monkeypatch.setattr("sys.platform", "other")
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "d") as folder:
            (folder / "f").write_text(text)
    assert (tmp_path / "d" / "f").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """`kill -9` in the middle: the file is one of the versions, whole, and what is left behind can be swept."""
    program = """
import sys
from pathlib import Path
from nomoat.files.atomic import atomic_write
version = 0
while True:
    with atomic_write(Path(sys.argv[1]) / "f") as file:
        for _ in range(50):
            file.write(b"%06d\\n" % version)
            file.flush()
    version += 1
    print(version, flush=True)
"""
    for round in range(6):
        child = run(program, tmp_path)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.003 * round)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        lines = (tmp_path / "f").read_bytes().splitlines()
        assert len(lines) == 50
        assert len(set(lines)) == 1
    leftovers = {p for p in tmp_path.iterdir() if p.name != "f"}
    assert set(sweep(tmp_path)) == leftovers
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_sweep_spares_the_living_and_the_foreign(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f".f.{gone.pid}-0123abcd.tmp"
    dead.mkdir()
    (dead / "x").write_text("x")
    alive = tmp_path / f".f.{os.getpid()}-0123abcd.tmp"
    alive.write_text("x")
    foreign = tmp_path / f".f.{gone.pid}.tmp"
    foreign.write_text("x")
    assert sweep(tmp_path) == [dead]
    assert set(tmp_path.iterdir()) == {alive, foreign}
    assert sweep(tmp_path / "none") == []
