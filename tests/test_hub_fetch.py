"""Downloads from servers that break off, lie, are busy or forward elsewhere."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_server import LocalServer, local_server
from nomoat.errors import NetworkError
from nomoat.hub.fetch import fetch, open_url
from nomoat.hub.store import hash_file

CONTENT = hashlib.shake_128(b"content").digest(300_000)


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as state:
        state.files["/model.gguf"] = CONTENT
        yield state


def get(server: LocalServer, target: Path, **options: object) -> list[float]:
    """Fetch /model.gguf; the pauses that were taken."""
    pauses: list[float] = []
    digest = hashlib.sha256(CONTENT).hexdigest()
    fetch(
        f"{server.url}/model.gguf",
        target,
        size=len(CONTENT),
        check=lambda path: hash_file(path) == digest,
        what="model.gguf",
        pause=pauses.append,
        **options,  # type: ignore[arg-type]
    )
    return pauses


def test_progress_ends_at_the_size(server: LocalServer, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    get(server, tmp_path / "part", progress=lambda *step: seen.append(step))
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert seen[-1] == ("model.gguf", len(CONTENT), len(CONTENT))


def test_goes_on_where_the_connection_broke(server: LocalServer, tmp_path: Path) -> None:
    server.faults = ["cut:100000", "status:503", "cut:50000"]
    pauses = get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert server.ranges("/model.gguf") == ["", "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert pauses == sorted(pauses)
    assert len(pauses) == 3


def test_goes_on_after_a_restart(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(CONTENT[:1234])
    get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert server.ranges("/model.gguf") == ["bytes=1234-"]


def test_a_server_that_ignores_range_starts_over(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(CONTENT[:1234])
    server.faults = ["norange"]
    get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert len(server.ranges("/model.gguf")) == 1


@pytest.mark.parametrize("left", [b"x" * 1234, b"x" * len(CONTENT), CONTENT + b"tail"], ids=["wrong", "wrong_whole", "longer"])
def test_a_partial_file_with_wrong_bytes_is_fetched_again(server: LocalServer, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "part").write_bytes(left)
    get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["garbage", "html", "endless"])
def test_wrong_bytes_twice_are_an_error_and_are_not_kept(server: LocalServer, tmp_path: Path, fault: str) -> None:
    server.faults = [fault, fault]
    with pytest.raises(NetworkError, match="web page" if fault == "html" else "not the expected file") as caught:
        get(server, tmp_path / "part")
    assert caught.value.code == "E_DIGEST"
    assert not (tmp_path / "part").exists()


def test_gives_up_after_six_tries_and_keeps_what_came(server: LocalServer, tmp_path: Path) -> None:
    server.faults = ["cut:10"] * 6
    with pytest.raises(NetworkError, match=r"6 times.*kept"):
        get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT[:60]


def test_a_refusal_is_not_retried(server: LocalServer, tmp_path: Path) -> None:
    server.faults = ["status:403"]
    with pytest.raises(NetworkError, match="403") as caught:
        get(server, tmp_path / "part")
    assert caught.value.code == "E_HTTP"
    assert len(server.requests) == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with local_server() as gone:
        pass
    with pytest.raises(NetworkError, match=r"[Rr]efused"):
        get(gone, tmp_path / "part")


def test_credentials_stay_with_their_host(server: LocalServer) -> None:
    with local_server() as other:
        other.files["/model.gguf"] = CONTENT
        server.redirects = {"/same": "/model.gguf", "/other": f"{other.url}/model.gguf"}
        for path in ("/same", "/other"):
            with open_url(urllib.request.Request(server.url + path, headers={"Authorization": "Bearer secret"})) as reply:
                assert reply.read() == CONTENT
        assert server.requests[1][2]["authorization"] == "Bearer secret"
        assert "authorization" not in other.requests[0][2]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(NetworkError, match="http"):
        open_url(url)
