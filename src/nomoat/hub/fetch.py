"""Fetch one URL into a file: resumed after any interruption, retried, and checked."""

from __future__ import annotations

import email.message
import functools
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from nomoat.errors import NetworkError, printable

#: told what is happening, bytes done, and bytes in all
Progress = Callable[[str, int, int], None]

ATTEMPTS = 6
TIMEOUT = 30.0  # seconds without a byte
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def fetch(
    url: str,
    target: Path,
    *,
    size: int,
    check: Callable[[Path], bool],
    what: str,
    headers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    pause: Callable[[float], None] | None = None,
) -> None:
    """Fetch `url` into `target`, going on from the bytes that are there already. `size` in bytes; `check` judges the whole file.

    Tries ATTEMPTS times with growing pauses (Retry-After is honoured up to 60 s). Bytes that fail `check` are thrown away and
    fetched once more from the start. Raises NetworkError: E_HTTP for a refusal, E_NETWORK when the line stays dead, E_DIGEST for
    wrong bytes; what was fetched stays for the next time, except after E_DIGEST.
    """
    for again in (False, True):
        if again:
            target.unlink(missing_ok=True)
        _fill(urllib.request.Request(url, headers=dict(headers or {})), target, size, what, progress, pause or time.sleep)
        seen = target.stat().st_size
        if seen == size and check(target):
            return
    with target.open("rb") as file:
        start = file.read(64).lstrip()
    target.unlink()
    page = " What came looks like a web page: a proxy or a login stands between." if start.startswith(b"<") else ""
    more = " and more" if seen > size else ""
    raise NetworkError(
        f"{what}: {printable(url)} sent {min(seen, size):,} bytes{more} that are not the expected file ({size:,} bytes "
        f"of a known digest), twice.{page} Nothing was kept. Check the index or hub that is configured",
        code="E_DIGEST",
    )


def fetch_start(url: str, target: Path, count: int, *, what: str, headers: Mapping[str, str] | None = None) -> None:
    """The first `count` bytes of a longer file, unchecked. Raises NetworkError."""
    target.touch()
    _fill(urllib.request.Request(url, headers=dict(headers or {})), target, count, what, None, time.sleep)
    os.truncate(target, min(count, target.stat().st_size))


def open_url(request: urllib.request.Request | str, timeout: float = TIMEOUT) -> http.client.HTTPResponse:
    """urlopen for http and https only, with certificates always checked and credentials never sent on to another host."""
    address = request if isinstance(request, str) else request.full_url
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise NetworkError(f"{printable(address)}: expected an http or https address")
    reply = _opener().open(request, timeout=timeout)
    assert isinstance(reply, http.client.HTTPResponse)
    return reply


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib would hand the Authorization header to whatever host a redirect names."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Proxies come from the environment. Pythons built without certificates of their own (macOS) use certifi's."""
    places = ssl.get_default_verify_paths()
    bundle = None
    if not (places.cafile or places.capath):
        import certifi

        bundle = certifi.where()
    context = ssl.create_default_context(cafile=bundle)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Redirects())


def _fill(
    request: urllib.request.Request,
    target: Path,
    size: int,
    what: str,
    progress: Progress | None,
    pause: Callable[[float], None],
) -> None:
    """Append to `target` until it has `size` bytes or the server has no more to give."""
    url, trouble = printable(request.full_url), ""
    for attempt in range(ATTEMPTS):
        have = target.stat().st_size if target.exists() else 0
        if have >= size:
            return
        wait = min(0.5 * 2.0**attempt, 15.0)
        if have:
            request.add_header("Range", f"bytes={have}-")
        elif request.has_header("Range"):
            request.remove_header("Range")
        try:
            with open_url(request) as reply:
                start = have if have and _continues(reply.headers, reply.status, have) else 0
                with target.open("ab" if start else "wb") as file:
                    _copy(reply, file, size, what, progress)
                announced = reply.headers.get("Content-Length") or ""
            have = target.stat().st_size
            if have >= size or (announced.isdigit() and have >= start + int(announced)):
                return  # all that the server has: the caller judges it
            trouble = f"the connection closed at {have:,} of {size:,} bytes"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in RETRY_STATUS and error.code != 416:
                raise NetworkError(f"{what}: {url} answered {error.code} {printable(str(error.reason))}", code="E_HTTP") from None
            if error.code == 416:  # our bytes are not a beginning of what the server has
                target.unlink(missing_ok=True)
            trouble = f"the server answered {error.code} {printable(str(error.reason))}"
            wait = max(wait, _retry_after(error.headers))
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            trouble = printable(str(reason) or type(reason).__name__)
        if attempt + 1 < ATTEMPTS:
            pause(wait)
    raise NetworkError(
        f"{what}: {url} failed {ATTEMPTS} times, at last because {trouble}. "
        "What has arrived is kept: the same command goes on from there"
    )


def _continues(headers: email.message.Message, status: int, have: int) -> bool:
    """True if the reply starts where our bytes end; a server that ignores Range sends everything again."""
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range") or "")
    return status == 206 and match is not None and int(match[1]) == have


def _copy(reply: http.client.HTTPResponse, file: IO[bytes], size: int, what: str, progress: Progress | None) -> None:
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
