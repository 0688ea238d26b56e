"""Names, and models that other programs left on this machine."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from nomoat.errors import FileFormatError, InputError, NotFoundError
from nomoat.hub import discover, names
from nomoat.hub.names import parse, resolve

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty stores of all programs below tmp_path."""
    for variable, folder in (("OLLAMA_MODELS", "ollama"), ("HF_HUB_CACHE", "hf"), ("LLAMA_CACHE", "llamacpp"), ("HOME", "home")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    return tmp_path


def ollama(root: Path, name: str, manifest: object, content: bytes | None = b"GGUF....") -> None:
    path = root / "ollama" / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    if content is not None:
        blobs = root / "ollama" / "blobs"
        blobs.mkdir(exist_ok=True)
        (blobs / f"sha256-{DIGEST}").write_bytes(content)


def layer(digest: object = f"sha256:{DIGEST}", kind: str = "application/vnd.ollama.image.model") -> dict[str, object]:
    return {"schemaVersion": 2, "layers": [{"mediaType": kind, "digest": digest, "size": 8}]}


def snapshot(root: Path, repo: str, files: dict[str, bytes], commit: str = "c1", main: bool = True) -> Path:
    folder = root / "hf" / f"models--{repo.replace('/', '--')}"
    for name, content in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


@pytest.mark.parametrize(
    ("text", "scheme", "name"),
    [
        ("smollm2:135m", "catalogue", "smollm2:135m"),
        ("./m.gguf", "path", "m.gguf"),
        ("m.gguf", "path", "m.gguf"),
        ("hf:org/repo", "hf", "hf:org/repo"),
        ("hf:org/repo/sub/m.gguf", "hf", "hf:org/repo/sub/m.gguf"),
        ("ollama:llama3.2:1b", "ollama", "ollama:llama3.2:1b"),
        ("lmstudio:pub/model-GGUF", "lmstudio", "lmstudio:pub/model-GGUF"),
        ("llamacpp:a b.gguf", "llamacpp", "llamacpp:a b.gguf"),
    ],
)
def test_parse(text: str, scheme: str, name: str) -> None:
    assert (parse(text).scheme, parse(text).name) == (scheme, name)


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf:", "hf:org", "hf:../..", "hf:org/repo/../../x", "hf:org\\repo/x", "hf:org/repo/", "ollama:", "ollama:../x"),
        *("ollama:a/./b", "lmstudio:a", "llamacpp:../../etc/passwd", "a\x1b[2Jb", "x" * 5000),
    ],
)
def test_names_that_mean_nothing(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_near_matches_are_offered() -> None:
    with pytest.raises(NotFoundError, match=r"Did you mean smollm2:135m\?.*nomoat models"):
        parse("smolm2:135m")
    with pytest.raises(NotFoundError, match=r"Did you mean smollm2:135m\?"):
        parse("smollm2")
    with pytest.raises(NotFoundError) as caught:
        parse("zzzz")
    assert "Did you mean" not in str(caught.value)


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(file)) == file
    with pytest.raises(NotFoundError, match=r"Did you mean model\.gguf"):
        resolve(str(tmp_path / "modle.gguf"))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileFormatError, match=r"config\.json"):
        resolve(str(folder))
    (folder / "inside.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileFormatError, match=r"inside\.gguf"):
        resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)) == folder


@pytest.mark.skipif(sys.platform == "win32", reason="device files")
def test_devices_pipes_and_sockets_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in ("/dev/zero", "/dev/random", tmp_path / "fifo", tmp_path / "socket"):
            with pytest.raises(FileFormatError) as caught:
                resolve(str(path))
            assert caught.value.code == "E_PATH"


def test_ollama(stores: Path) -> None:
    ollama(stores, "registry.ollama.ai/library/llama3.2/1b", layer())
    ollama(stores, "registry.ollama.ai/library/llama3.2/latest", layer())
    ollama(stores, "registry.ollama.ai/someone/thing/latest", layer())
    ollama(stores, "hf.co/org/repo/Q4_K_M", layer())
    blob = stores / "ollama" / "blobs" / f"sha256-{DIGEST}"
    for name in ("llama3.2:1b", "llama3.2", "llama3.2:latest", "someone/thing", "hf.co/org/repo:Q4_K_M"):
        assert resolve(f"ollama:{name}") == blob
    listed = [model for model in discover.discover() if model.origin == "Ollama"]
    assert len(listed) == 1, "four names of one file are one model"
    assert listed[0].size == 8


@pytest.mark.parametrize(
    ("manifest", "content", "why"),
    [
        ("not json", b"GGUF", "cannot be read"),
        ('{"layers": [3]}', b"GGUF", "cannot be read"),
        ("[" * 100_000, b"GGUF", "cannot be read"),
        (layer(kind="application/vnd.ollama.image.tensor"), b"GGUF", "no GGUF"),
        (layer("sha256:../../../etc/passwd"), b"GGUF", "not there"),
        (layer(f"sha256:{DIGEST}\n"), b"GGUF", "not there"),
        (layer(None), b"GGUF", "not there"),
        (layer(), None, "not there"),
        (layer(), b"\x1b[2J", "expected b'GGUF'"),
    ],
)
def test_ollama_models_that_cannot_be_used(stores: Path, manifest: object, content: bytes | None, why: str) -> None:
    ollama(stores, "registry.ollama.ai/library/bad/latest", manifest, content)
    with pytest.raises(FileFormatError, match=why):
        resolve("ollama:bad")
    assert [why in model.problem for model in discover.discover()] == [True]


def test_huggingface_cache(stores: Path) -> None:
    weights = {"config.json": b"{}", "model.safetensors": b"12345"}
    snapshot(stores, "org/repo", {"config.json": b"old"}, commit="c0")
    current = snapshot(stores, "org/repo", weights)
    ggufs = snapshot(stores, "org/my--model", {"m-Q8_0.gguf": b"8", "m-Q4_K_M.gguf": b"4", "mmproj.gguf": b"p"}, main=False)
    assert resolve("hf:org/repo") == current
    assert resolve("hf:org/my--model") == ggufs / "m-Q4_K_M.gguf"
    assert resolve("hf:org/my--model/m-Q8_0.gguf") == ggufs / "m-Q8_0.gguf"
    with pytest.raises(NotFoundError, match="nomoat pull hf:org/other"):
        resolve("hf:org/other")
    assert [(model.name, model.size) for model in discover.discover()] == [
        ("hf:org/my--model/m-Q4_K_M.gguf", 1),
        ("hf:org/my--model/m-Q8_0.gguf", 1),
        ("hf:org/repo", 5),
    ]


def test_an_unfinished_download_in_the_cache(stores: Path) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": b"1"}
    snapshot(stores, "org/repo", files)
    with pytest.raises(FileFormatError, match=r"Missing: model-00002"):
        resolve("hf:org/repo")


def test_lm_studio(stores: Path) -> None:
    models = stores / "elsewhere"
    for path in ("pub/one/m.gguf", "pub/one/mmproj-m.gguf", "pub/two/a.gguf", "pub/two/b-Q4_K_M.gguf"):
        (models / path).parent.mkdir(parents=True, exist_ok=True)
        (models / path).write_bytes(path.encode())
    home = stores / "lmstudio-home"
    home.mkdir()
    (home / "settings.json").write_text(json.dumps({"downloadsFolder": str(models)}))
    (stores / "home" / ".lmstudio-home-pointer").write_text(f"{home}\n")
    assert resolve("lmstudio:pub/one") == models / "pub/one/m.gguf"
    assert resolve("lmstudio:pub/two") == models / "pub/two/b-Q4_K_M.gguf"
    assert resolve("lmstudio:pub/two/a.gguf") == models / "pub/two/a.gguf"
    with pytest.raises(NotFoundError, match="lmstudio:pub/one"):
        resolve("lmstudio:pub/three")


def test_llama_cpp(stores: Path) -> None:
    for name, content in (("a.gguf", b"GGUF"), ("m-00001-of-00002.gguf", b"123"), ("m-00002-of-00002.gguf", b"45")):
        (stores / "llamacpp" / name).write_bytes(content)
    assert resolve("llamacpp:a.gguf") == stores / "llamacpp" / "a.gguf"
    assert [(m.name, m.size) for m in discover.discover()] == [("llamacpp:a.gguf", 4), ("llamacpp:m-00001-of-00002.gguf", 5)]


def test_discovery_writes_nothing(stores: Path) -> None:
    ollama(stores, "registry.ollama.ai/library/a/latest", layer())
    snapshot(stores, "org/repo", {"m.gguf": b"GGUF"})

    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in stores.rglob("*"))

    before = state()
    discover.discover()
    resolve("ollama:a")
    resolve("hf:org/repo/m.gguf")
    assert state() == before


def test_stores_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OLLAMA_MODELS", "HF_HUB_CACHE", "LLAMA_CACHE", "HOME"):
        monkeypatch.setenv(variable, "/nonexistent")
    assert discover.discover() == []


def test_every_prefix_has_a_finder() -> None:
    assert set(discover.FINDERS) == set(names.PREFIXES)
