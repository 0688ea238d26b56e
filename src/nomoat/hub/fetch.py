"""Fetch one URL into a file: resumed after any interruption, retried, and checked against a digest."""

from __future__ import annotations

import email.message
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from nomoat.errors import NetworkError, printable
from nomoat.hub.store import hash_file

#: told what is happening, bytes done, and bytes in all (0 = not known)
Progress = Callable[[str, int, int], None]

ATTEMPTS = 6
TIMEOUT = 30.0  # seconds without a byte
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def fetch(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str | None,
    what: str,
    headers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch `url` into `target`, going on from the bytes that are there already. `size` in bytes; `sha256` 64 hex digits.

    Tries ATTEMPTS times with growing pauses (Retry-After is honoured up to 60 s). Bytes that do not match are thrown away and
    fetched once more from the start. Raises NetworkError: E_HTTP for a refusal, E_NETWORK when the line stays dead, E_DIGEST for
    wrong bytes; what was fetched stays for the next time, except after E_DIGEST.
    """
    for full in (False, True):
        if full:
            target.unlink(missing_ok=True)
        _fill(url, target, size, what, dict(headers or {}), progress, pause)
        if target.stat().st_size == size and (sha256 is None or hash_file(target) == sha256):
            return
    seen, start = target.stat().st_size, target.read_bytes()[:64] if target.stat().st_size < 1 << 20 else b""
    target.unlink()
    page = " What came looks like a web page: a proxy or a login stands between." if start.lstrip().startswith(b"<") else ""
    raise NetworkError(
        f"{what}: {printable(url)} sent {seen:,} bytes that are not the expected file ({size:,} bytes"
        f"{f', sha256 {sha256[:12]}...' if sha256 else ''}), twice.{page} Check the index or hub that is configured",
        code="E_DIGEST",
    )


def _fill(
    url: str, target: Path, size: int, what: str, headers: dict[str, str], progress: Progress | None, pause: Callable[[float], None]
) -> None:
    """Append to `target` until it has `size` bytes or the server has no more to give."""
    trouble = ""
    for attempt in range(ATTEMPTS):
        have = target.stat().st_size if target.exists() else 0
        if have >= size:
            return
        wait = min(2.0**attempt * 0.5, 15.0)
        request = urllib.request.Request(url, headers={**headers, "Range": f"bytes={have}-"} if have else headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                mode = "ab" if have and _continues(reply.headers, reply.status, have) else "wb"
                with target.open(mode) as file:
                    _copy(reply, file, size, what, progress)
            if mode == "wb" or target.stat().st_size >= size:
                if target.stat().st_size >= size or reply.headers.get("Content-Length") is None:
                    return
            trouble = f"the connection closed at {target.stat().st_size:,} of {size:,} bytes"
            if int(reply.headers.get("Content-Length") or 0) not in (0, size - (have if mode == "ab" else 0)):
                return  # the server means to send something of another size: the caller says so
        except urllib.error.HTTPError as error:
            if error.code == 416:  # our partial file is longer than what the server has
                target.unlink(missing_ok=True)
            elif error.code not in RETRY_STATUS:
                raise NetworkError(f"{what}: {printable(url)} answered {error.code} {printable(str(error.reason))}", code="E_HTTP") from None
            trouble = f"the server answered {error.code} {printable(str(error.reason))}"
            wait = max(wait, _retry_after(error.headers))
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            trouble = printable(str(reason) or type(reason).__name__)
        if attempt + 1 < ATTEMPTS:
            pause(wait)
    raise NetworkError(
        f"{what}: {printable(url)} failed {ATTEMPTS} times, at last because {trouble}. "
        "What has arrived is kept: the same command goes on from there"
    )


def _continues(headers: email.message.Message, status: int | None, have: int) -> bool:
    """True if the reply starts where our bytes end; a server that ignores Range sends everything again."""
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range") or "")
    return status == 206 and match is not None and int(match[1]) == have


def _copy(reply: IO[bytes], file: IO[bytes], size: int, what: str, progress: Progress | None) -> None:
    """At most one byte more than `size` is kept, so an endless reply cannot fill the disk."""
    done = file.tell()
    while done <= size and (chunk := reply.read(min(1 << 18, size + 1 - done))):
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(what, min(done, size), size)


def _retry_after(headers: email.message.Message) -> float:
    value = headers.get("Retry-After") or ""
    return min(float(value), 60.0) if value.isdigit() else 0.0
