"""The model store: nothing half-written is ever visible, whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nomoat.errors import FileFormatError, NotFoundError, ResourceError
from nomoat.hub.lock import exclusive
from nomoat.hub.store import Manifest, Store, StoredFile, check_disk, check_relative, parse_digest


def add(store: Store, name: str, files: dict[str, bytes]) -> Manifest:
    with store.writing(f"add {name}"):
        stored = []
        for path, content in files.items():
            source = store.tmp / "source"
            source.write_bytes(content)
            stored.append(store.add_blob(source, path))
        return store.put(name, tuple(stored), source="test", licence="MIT")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def test_round_trip(store: Store) -> None:
    manifest = add(store, "hf:Org/Repo", {"model.gguf": b"GGUF1234"})
    assert store.get("hf:Org/Repo") == manifest
    assert store.get("hf:org/repo") is None
    path = store.path(manifest)
    assert path.name == "model.gguf"
    assert path.read_bytes() == b"GGUF1234"
    assert store.verify() == []
    assert not store.tmp.exists()


def test_a_folder_keeps_its_file_names(store: Store) -> None:
    path = store.path(add(store, "m", {"config.json": b"{}", "model.safetensors": b"weights", "sub/x.json": b"[]"}))
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "sub/x.json": b"[]",
    }


def test_shards_open_at_the_first(store: Store) -> None:
    parts = {f"m-0000{i}-of-00002.gguf": b"GGUF%d" % i for i in (2, 1)}
    path = store.path(add(store, "m", parts))
    assert path.name == "m-00001-of-00002.gguf"
    assert (path.parent / "m-00002-of-00002.gguf").is_file()


def test_works_without_hard_links(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert store.path(add(store, "m", {"m.gguf": b"GGUF"})).read_bytes() == b"GGUF"


def test_a_missing_tree_is_rebuilt(store: Store) -> None:
    manifest = add(store, "m", {"m.gguf": b"GGUF"})
    path = store.path(manifest)
    path.unlink()
    assert store.path(manifest).read_bytes() == b"GGUF"


def test_remove_frees_what_no_other_model_uses(store: Store) -> None:
    add(store, "one", {"a.gguf": b"shared", "b.json": b"only one"})
    two = add(store, "two", {"c.gguf": b"shared"})
    with store.writing("rm"):
        assert store.remove("one") == len(b"only one")
    assert store.names() == ["two"]
    assert store.path(two).read_bytes() == b"shared"
    assert store.verify() == []
    with store.writing("rm"), pytest.raises(NotFoundError):
        store.remove("one")
    with store.writing("rm"):
        assert store.remove("two") == len(b"shared")
    assert list(store.blobs.iterdir()) == []
    assert list(store.trees.iterdir()) == []


def test_damage_is_found_and_repaired_by_adding_again(store: Store) -> None:
    manifest = add(store, "m", {"m.gguf": b"GGUF-right"})
    blob = store.blob_path(manifest.files[0].digest)
    blob.chmod(0o644)
    blob.write_bytes(b"GGUF-wrong")
    assert store.verify(deep=False) == []
    assert "do not match" in store.verify()[0]
    blob.write_bytes(b"GGUF")
    assert "4 bytes instead of 10" in store.verify()[0]
    with pytest.raises(FileFormatError, match="nomoat pull m") as caught:
        store.path(manifest)
    assert caught.value.code == "E_MISSING"
    assert store.path(add(store, "m", {"m.gguf": b"GGUF-right"})).read_bytes() == b"GGUF-right"
    assert store.verify() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(files=[]),
        lambda r: r.update(format=99),
        lambda r: r["files"][0].update(digest="sha256:../../x"),
        lambda r: r["files"][0].update(path="../../x"),
        lambda r: r["files"][0].update(size="many"),
        lambda r: r.pop("name"),
        lambda r: r.update(name="another"),
    ],
    ids=["no_files", "future", "digest", "path", "size", "nameless", "renamed"],
)
def test_one_damaged_manifest_does_not_hide_the_others(store: Store, change: object) -> None:
    add(store, "good", {"a.gguf": b"good"})
    bad = add(store, "bad", {"b.gguf": b"bad"})
    path = next(p for p in store.manifests.glob("bad-*.json"))
    record = json.loads(path.read_text())
    change(record)  # type: ignore[operator]
    path.write_text(json.dumps(record))
    manifests, damaged = store.read_all()
    assert [m.name for m in manifests] == ["good"]
    assert len(damaged) == 1
    assert len(store.verify()) == 1
    with store.writing("gc"):
        store.gc()
    kept = b"sha256" in path.read_bytes() and bad.files[0].digest[7:].encode() in path.read_bytes()
    assert store.blob_path(bad.files[0].digest).exists() == kept
    with store.writing("rm"):
        store.remove("bad")
    assert store.verify() == []
    assert store.names() == ["good"]


@pytest.mark.parametrize("text", ["[" * 100_000, "", "\x00", "{}", "null", '{"files": 3}', b"\xff\xfe".decode("latin-1")])
def test_manifests_that_are_not_ours(store: Store, text: str) -> None:
    store.manifests.mkdir(parents=True)
    (store.manifests / "x.json").write_text(text, encoding="latin-1")
    assert len(store.verify()) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "sha256:../../x", f"sha1:{'a' * 64}", f"sha256-{'a' * 64}", f"sha256:{'a' * 64}\n", f"\nsha256:{'a' * 64}"),
        *(f"sha256:{hex_}" for hex_ in ("a" * 63, "a" * 65, "A" * 64, "٣" * 64)),
    ],
)
def test_digests_become_file_names_so_nothing_else_passes(text: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        parse_digest(text)
    assert caught.value.code == "E_PATH"
    assert "\n" not in str(caught.value)


def test_a_digest() -> None:
    assert parse_digest("sha256:" + "0f" * 32) == "0f" * 32


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "a/../../x", "a\\b", "c:x", "a\nb", "a\0b", "a*"])
def test_unsafe_file_paths(path: str) -> None:
    with pytest.raises(FileFormatError):
        check_relative(path)


def test_disk_space_is_checked_with_numbers(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1, "m")
    with pytest.raises(ResourceError, match=r"1,000,000,000 MB.*NOMOAT_HOME") as caught:
        check_disk(tmp_path, 10**15, "m")
    assert caught.value.code == "E_DISK"


def test_second_writer_is_told_who_holds_the_store(store: Store) -> None:
    told: list[str] = []
    with (
        store.writing("pull big"),
        pytest.raises(ResourceError, match=rf"process {os.getpid()} \(pull big\)") as caught,
        exclusive(store.root / "lock", "second", wait=0.1, tell=told.append),
    ):
        pytest.fail("two writers at once")
    assert caught.value.code == "E_LOCKED"
    assert len(told) == 1
    with store.writing("free again", wait=0.1):
        pass


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="NOMOAT_HOME"), Store(tmp_path / "file" / "models").writing("x"):
        pytest.fail("wrote below a file")


def test_unfinished_downloads_survive_until_asked(store: Store) -> None:
    with store.writing("x"):
        (store.partial / "abc").write_bytes(b"12345")
        (store.tmp / "scratch").write_bytes(b"1")
    with store.writing("gc"):
        assert store.gc() == 0
        assert (store.partial / "abc").exists()
        assert store.gc(partial=True) == 5
    assert not store.tmp.exists()


WRITER = """
import sys
from pathlib import Path
from nomoat.hub.store import Store
store, n = Store(Path(sys.argv[1])), 0
print("ready", flush=True)
while True:
    n += 1
    with store.writing("add"):
        source = store.tmp / "source"
        source.write_bytes(b"GGUF%d" % (n % 7) * 20000)
        stored = store.add_blob(source, "m.gguf")
        store.put(f"model{n % 3}", (stored,), source="test", licence="MIT")
    if n % 2:
        with store.writing("rm"):
            store.remove(f"model{n % 3}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_at_any_moment_leaves_a_sound_store(store: Store) -> None:
    dice = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(store.root)], stdout=subprocess.PIPE, env=environment)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0.0, 0.06))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert store.verify() == []
        for manifest in store.read_all()[0]:
            assert store.path(manifest).read_bytes()[:4] == b"GGUF"
    with store.writing("gc", wait=1):
        store.gc()
    used = {store.blob_path(file.digest).name for manifest in store.read_all()[0] for file in manifest.files}
    assert {blob.name for blob in store.blobs.iterdir()} == used
    assert not [path for path in store.manifests.iterdir() if path.suffix != ".json"]


def test_eight_writers_at_once(store: Store) -> None:
    script = WRITER.replace("while True:", "for _ in range(12):")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(store.root)]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) for _ in range(8)]
    errors = [child.communicate(timeout=60)[1].decode() for child in children]
    # A writer may find that another has removed the model it wanted to remove; nothing else may go wrong.
    assert [e for e in errors if e and "NotFoundError" not in e] == []
    assert store.verify() == []


def test_names_are_found_by_name_not_by_file(store: Store) -> None:
    for name in ("a:b", "a-b", "A:B", "a/b", "x" * 300):
        add(store, name, {"m.gguf": name.encode()})
    assert {m.name: store.path(m).read_bytes().decode() for m in store.read_all()[0]} == {n: n for n in store.names()}
    assert len(store.names()) == 5


def test_stored_file_record() -> None:
    manifest = Manifest("m", (StoredFile("m.gguf", f"sha256:{'a' * 64}", 3),), "s", "l", "2030-01-01T00:00:00Z")
    assert Manifest.from_json(manifest.to_json(), Path("x")) == manifest
    assert manifest.size == 3
